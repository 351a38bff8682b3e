// Rotation of queries and keys, the paged cache, and attention over it.
//
// Every sum has an order that depends on its own token alone: which tokens and heads are computed together, and what else is
// in the step, changes nothing. A score is 16 sums over the dimensions i, i + 16, i + 32 .., added up as ``sum`` adds a
// vector's lanes; an output adds its keys' values one after the other.

#include <algorithm>
#include <type_traits>
#include <vector>

#include "pool.h"
#include "vectors.h"

namespace {

constexpr int64_t KEYS = LANES;        // as many keys are looked at together, one in each lane
constexpr int ROWS = 4;                // as many queries of a task share what was read of a key
constexpr int64_t SECOND_LEVEL = 1 << 20;  // bytes of a core's cache, about
constexpr int64_t AHEAD = 4 * KEYS;    // keys and values are asked for this many tokens before they are read
constexpr int64_t ROWS_OF_TASK = 32;   // at most, unless one token has more heads

struct Shape {
  int64_t heads, kv_heads, head_dim, rotary_dim, block_size, window;
  int shift;  // block_size is 2^shift; -1: it is no power of two, which no engine takes

  int64_t block_of(int64_t position) const { return shift < 0 ? position / block_size : position >> shift; }
};

inline int shift_of(int64_t size) {
  int shift = 0;
  while (int64_t{1} << shift < size) shift++;
  return int64_t{1} << shift == size ? shift : -1;
}

// A layer's cache. Scales are of 8-bit numbers only: a number is its scale times what is stored.
template <typename C>
struct Cache { C *k, *v; f16 *k_scale, *v_scale; };

// Where each token's sequence has its blocks.
struct Pages {
  const int32_t *positions, *slots, *tables;  // [tokens], [tokens], [slots, width]
  int64_t width;
  const int32_t* of(int64_t token) const { return tables + slots[token] * width; }
};

// ---- rotation and cache ----

inline void rotate(float* x, const float* cos_sin, const Shape& s, float scale) {
  const int64_t half = s.rotary_dim / 2;
  for (int64_t i = 0; i < half; i++) {
    const float a = x[i], b = x[i + half], cosine = cos_sin[i], sine = cos_sin[i + half];
    x[i] = (a * cosine - b * sine) * scale;
    x[i + half] = (b * cosine + a * sine) * scale;
  }
  for (int64_t i = s.rotary_dim; i < s.head_dim; i++) x[i] *= scale;
}

// A head as sums of all its numbers with signs (see kernels/reference.py, spread): of a size that is no power of two, in pieces.
inline void spread(float* x, int64_t size) {
  const int64_t piece = size & -size;
  const float length = 1.0f / std::sqrt(static_cast<float>(piece));
  for (int64_t bit = 1; bit < piece; bit *= 2)
    for (int64_t first = 0; first < size; first += 2 * bit)
      for (int64_t i = first; i < first + bit; i++) {
        const float a = x[i], b = x[i + bit];
        x[i] = a + b;
        x[i + bit] = a - b;
      }
  for (int64_t i = 0; i < size; i++) x[i] *= length;
}

struct HeadNorms { const float *q, *k; float eps; };  // null: there are none

inline void head(const float* x, const float* norm, float eps, const float* angles, const Shape& s, float scale, float* out) {
  if (norm) norm_row(x, norm, out, s.head_dim, eps); else std::memcpy(out, x, s.head_dim * sizeof(float));
  rotate(out, angles, s, scale);
}

// One head's key or value to ``place``, which counts heads of tokens.
template <typename C>
inline void put(const float* x, C* cache, f16*, int64_t place, int64_t size) {
  for (int64_t i = 0; i < size; i++) narrow(x[i], cache + place * size + i);
}
// The nearest number of 8 bits, of two the even one, of ``v``, which is 1 / most of the largest at most.
inline void narrow(float v, int8_t* out) {
  const float whole = std::nearbyint(v);
  *out = static_cast<int8_t>(whole >= 127.0f ? 127.0f : whole > -127.0f ? whole : -127.0f);
}
inline void narrow(float v, e4m3* out) {
  const uint32_t bits = as_bits(v), size = as_bits(std::fmin(std::fabs(v), 448.0f) * 0x1p-120f);
  out->bits = static_cast<uint8_t>((bits >> 24 & 0x80u) | (size + 0x7ffffu + ((size >> 20) & 1u)) >> 20);
}
constexpr float most(const int8_t*) { return 127.0f; }
constexpr float most(const e4m3*) { return 448.0f; }

template <typename C>
inline void put_scaled(const float* x, C* cache, f16* scales, int64_t place, int64_t size) {
  float largest = 0.0f, nothing = 0.0f;
  for (int64_t i = 0; i < size; i++) {
    largest = std::fabs(x[i]) <= largest ? largest : std::fabs(x[i]);
    nothing += x[i] * 0.0f;  // NaN where a number is not finite
  }
  largest = largest / most(cache);
  narrow((largest < 1e-6f ? 1e-6f : largest) + nothing, scales + place);
  const float scale = wide(scales[place]);
  for (int64_t i = 0; i < size; i++) narrow(x[i] / scale, cache + place * size + i);
}
inline void put(const float* x, int8_t* cache, f16* scales, int64_t place, int64_t size) { put_scaled(x, cache, scales, place, size); }
inline void put(const float* x, e4m3* cache, f16* scales, int64_t place, int64_t size) { put_scaled(x, cache, scales, place, size); }

// One token's queries to q_out, its keys and values to the cache.
template <typename C>
void rope_token(const float* row, const float* angles, float q_scale, const HeadNorms& norms, int64_t place,
                const Cache<C>& cache, float* q_out, const Shape& s) {
  static thread_local std::vector<float> key;
  const int64_t d = s.head_dim;
  key.resize(d);
  for (int64_t h = 0; h < s.heads; h++) {
    head(row + h * d, norms.q, norms.eps, angles, s, q_scale, q_out + h * d);
    if (sizeof(C) == 1) spread(q_out + h * d, d);
  }
  for (int64_t h = 0; h < s.kv_heads; h++) {
    head(row + (s.heads + h) * d, norms.k, norms.eps, angles, s, 1.0f, key.data());
    if (sizeof(C) == 1) spread(key.data(), d);
    put(key.data(), cache.k, cache.k_scale, place + h * s.block_size, d);
    put(row + (s.heads + s.kv_heads + h) * d, cache.v, cache.v_scale, place + h * s.block_size, d);
  }
}

template <typename C>
void rope_all(const float* qkv, int64_t width, const float* cos_sin, const float* q_scale, const Pages& pages,
              const HeadNorms& norms, const Cache<C>& cache, float* q_out, int64_t tokens, const Shape& s) {
  in_parts(tokens, part_size(tokens, width), [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; t++) {
      const int64_t block = s.block_of(pages.positions[t]), offset = pages.positions[t] - block * s.block_size;
      rope_token(qkv + t * width, cos_sin + t * s.rotary_dim, q_scale ? q_scale[t] : 1.0f, norms,
                 pages.of(t)[block] * s.kv_heads * s.block_size + offset, cache, q_out + t * s.heads * s.head_dim, s);
    }
  });
}

// ---- what is read of the cache ----

inline float wide(int8_t v) { return v; }

// A number of one head's keys or values, and what they are to be multiplied by.
template <typename C>
struct Line {
  const C* numbers;
  float scale;
  of_floats piece(int64_t i) const { return sizeof(C) == 1 ? part(numbers + i) * scale : part(numbers + i); }
  floats at(int64_t i) const { return sizeof(C) == 1 ? load(numbers + i) * scale : load(numbers + i); }
  float one(int64_t i) const { return sizeof(C) == 1 ? wide(numbers[i]) * scale : wide(numbers[i]); }
};

// A KV head of one sequence.
template <typename C>
struct Lines {
  const Cache<C>& cache;
  const Shape& s;
  const int32_t* table;
  int64_t kv_head;

  int64_t place(int64_t position) const {
    const int64_t block = s.block_of(position);
    return (table[block] * s.kv_heads + kv_head) * s.block_size + position - block * s.block_size;
  }
  Line<C> of(const C* numbers, const f16* scales, int64_t position) const {
    const int64_t at = place(position);
    return {numbers + at * s.head_dim, scales ? wide(scales[at]) : 1.0f};
  }
  void ask_for(const C* numbers, int64_t position) const {
    ::ask_for(numbers + place(position) * s.head_dim, s.head_dim * sizeof(C));
  }
  Line<C> key(int64_t position) const { return of(cache.k, cache.k_scale, position); }
  Line<C> value(int64_t position) const { return of(cache.v, cache.v_scale, position); }
};

// KEYS keys from ``position`` on as columns: out [head_dim, KEYS]. Nobody looks at those in front of ``start`` and from ``end``
// on: others stand in their place.
template <typename C>
void columns_of_keys(const Lines<C>& lines, int64_t position, int64_t start, int64_t end, float* out) {
  const int64_t d = lines.s.head_dim;
  Line<C> keys[KEYS];
  for (int64_t j = 0; j < KEYS; j++) keys[j] = lines.key(std::max(start, std::min(position + j, end - 1)));
  int64_t i = 0;
  for (; i + LANES <= d; i += LANES) {
    transposed([&](int key, int lane) { return keys[key].piece(i + lane); },
               [&](int row, int key, of_floats found) { write(out + (i + row) * KEYS + key, found); });
  }
  for (; i < d; i++)
    for (int64_t j = 0; j < KEYS; j++) out[i * KEYS + j] = keys[j].one(i);
}

// ---- scores ----

template <int N>
struct Many { floats of[N]; };

// The sums over dimensions ``lane``, lane + 16, .. of N queries with 16 keys, and of the lanes that are added to it. As
// ``sum`` does: lanes that are 8 apart first, then 4, 2, 1.
template <int N, int STRIDE>
inline Many<N> lanes_from(const float* q, int64_t d, const float* keys, int64_t lane) {
  if constexpr (STRIDE == LANES) {
    Many<N> acc = {};
    for (int64_t i = lane; i < d / LANES * LANES; i += LANES) {
      const floats k = load(keys + i * KEYS);
      for (int n = 0; n < N; n++) acc.of[n] += q[n * d + i] * k;
    }
    return acc;
  } else {
    Many<N> a = lanes_from<N, STRIDE * 2>(q, d, keys, lane);
    const Many<N> b = lanes_from<N, STRIDE * 2>(q, d, keys, lane + STRIDE);
    for (int n = 0; n < N; n++) a.of[n] += b.of[n];
    return a;
  }
}

template <int N>
inline Many<N> scores(const float* q, int64_t d, const float* keys) {
  Many<N> total = lanes_from<N, 1>(q, d, keys, 0);
  for (int64_t i = d / LANES * LANES; i < d; i++)
    for (int n = 0; n < N; n++) total.of[n] += q[n * d + i] * load(keys + i * KEYS);
  return total;
}

// ---- tasks: some tokens of a sequence that follow each other, one KV head, all query heads of its group ----

struct Task {
  int64_t token, tokens, kv_head, group, position;  // of the first token

  int64_t rows() const { return tokens * group; }
};

// A query: the keys that it sees, and their weights.
struct Row { const float* q; float *out, *weights; int64_t first, last; };

constexpr int64_t MARGIN = KEYS;  // in front of a row's weights: what a block of keys has before its first

inline void softmax(float* w, int64_t count) {
  const int64_t padded = (count + LANES - 1) / LANES * LANES;
  for (int64_t j = count; j < padded; j++) w[j] = -INFINITY;
  floats tops = load(w);
  for (int64_t j = LANES; j < padded; j += LANES) { const floats v = load(w + j); tops = choose(v > tops, v, tops); }
  float each[LANES], top;
  store(each, tops);
  top = *std::max_element(each, each + LANES);
  floats totals = {};
  for (int64_t j = 0; j < padded; j += LANES) {
    const floats e = exponential(load(w + j) - top);
    store(w + j, e);
    totals += e;
  }
  const float inverse = 1.0f / sum(totals);
  for (int64_t j = 0; j < padded; j += LANES) store(w + j, load(w + j) * inverse);
}

template <int N>
inline void score_rows(const Row* rows, int64_t d, const float* keys, int64_t position) {
  const float scale = 1.0f / std::sqrt(static_cast<float>(d));
  const Many<N> found = scores<N>(rows[0].q, d, keys);
  for (int n = 0; n < N; n++) {
    const Row& row = rows[n];
    if (position < row.last && position + KEYS > row.first) store(row.weights + position - row.first, found.of[n] * scale);
  }
}

// out += weights * values of the keys first to last - 1, for N rows that see all of them, dimensions ``dim`` on
template <int N, int VECTORS, typename C>
inline void add_values(const Row* rows, const Lines<C>& lines, int64_t first, int64_t last, int64_t dim) {
  floats acc[N][VECTORS];
  for (int n = 0; n < N; n++)
    for (int v = 0; v < VECTORS; v++) acc[n][v] = load(rows[n].out + dim + v * LANES);
  for (int64_t p = first; p < last; p++) {
    if (p + AHEAD < last) lines.ask_for(lines.cache.v, p + AHEAD);
    const Line<C> line = lines.value(p);
    for (int v = 0; v < VECTORS; v++) {
      const floats value = line.at(dim + v * LANES);
      for (int n = 0; n < N; n++) acc[n][v] += rows[n].weights[p - rows[n].first] * value;
    }
  }
  for (int n = 0; n < N; n++)
    for (int v = 0; v < VECTORS; v++) store(rows[n].out + dim + v * LANES, acc[n][v]);
}

template <int N, typename C>
void add_all_values(const Row* rows, const Lines<C>& lines, int64_t first, int64_t last) {
  if (first >= last) return;
  const int64_t d = lines.s.head_dim;
  int64_t i = 0;
  for (; i + 4 * LANES <= d; i += 4 * LANES) add_values<N, 4>(rows, lines, first, last, i);
  for (; i + LANES <= d; i += LANES) add_values<N, 1>(rows, lines, first, last, i);
  for (int64_t p = first; p < last && i < d; p++)
    for (int n = 0; n < N; n++)
      for (int64_t rest = i; rest < d; rest++)
        rows[n].out[rest] = std::fma(rows[n].weights[p - rows[n].first], lines.value(p).one(rest), rows[n].out[rest]);
}

template <int N, typename C>
void values_of_rows(const Row* rows, const Lines<C>& lines) {
  int64_t first = rows[0].first, last = rows[0].last;  // what all of them see
  for (int n = 1; n < N; n++) { first = std::max(first, rows[n].first); last = std::min(last, rows[n].last); }
  last = std::max(first, last);
  for (int n = 0; n < N; n++) add_all_values<1>(rows + n, lines, rows[n].first, std::min(first, rows[n].last));
  add_all_values<N>(rows, lines, first, last);
  for (int n = 0; n < N; n++) add_all_values<1>(rows + n, lines, std::max(last, rows[n].first), rows[n].last);
}

// body(rows, how many) with at most four at a time; how many is a constant.
template <typename F>
inline void by_fours(const std::vector<Row>& rows, F&& body) {
  const Row *row = rows.data(), *end = row + rows.size();
  for (; row + ROWS <= end; row += ROWS) body(row, std::integral_constant<int, ROWS>());
  switch (end - row) {
    case 3: return body(row, std::integral_constant<int, 3>());
    case 2: return body(row, std::integral_constant<int, 2>());
    case 1: return body(row, std::integral_constant<int, 1>());
  }
}

// Rows of a task are neighbours in ``q`` of one token only: they are laid out one after the other first.
template <typename C>
void attend(const Task& t, const float* q, const Cache<C>& cache, const Pages& pages, float* out, const Shape& s) {
  static thread_local std::vector<float> queries, weights, keys;
  static thread_local std::vector<Row> rows;
  const int64_t d = s.head_dim, end = t.position + t.tokens;
  const int64_t start = s.window > 0 && t.position + 1 > s.window ? t.position + 1 - s.window : 0;
  const int64_t width = MARGIN + (end - start + KEYS - 1) / KEYS * KEYS + KEYS, whole_group = t.group * d;
  queries.resize(t.rows() * d);
  weights.resize(t.rows() * width);
  keys.resize(d * KEYS);
  rows.clear();
  for (int64_t i = 0; i < t.tokens; i++) {
    const int64_t at = (t.token + i) * s.heads * d + t.kv_head * whole_group, last = t.position + i + 1;
    std::memcpy(queries.data() + i * whole_group, q + at, whole_group * sizeof(float));
    std::memset(out + at, 0, whole_group * sizeof(float));
    for (int64_t g = 0; g < t.group; g++) {
      const int64_t r = i * t.group + g;
      const int64_t first = s.window > 0 && last > s.window ? last - s.window : 0;
      rows.push_back({queries.data() + r * d, out + at + g * d, weights.data() + r * width + MARGIN, first, last});
    }
  }
  const Lines<C> lines{cache, s, pages.of(t.token), t.kv_head};
  const bool fits = (end - start) * d * sizeof(C) <= SECOND_LEVEL / 4;  // then values come while scores are computed
  for (int64_t p = start / KEYS * KEYS; p < end; p += KEYS) {
    for (int64_t j = 0; j < KEYS; j++) {
      if (p + AHEAD + j < end) lines.ask_for(cache.k, p + AHEAD + j);
      if (p + j < end && fits) lines.ask_for(cache.v, p + j);
    }
    columns_of_keys(lines, p, start, end, keys.data());
    by_fours(rows, [&](const Row* some, auto n) { score_rows<n>(some, d, keys.data(), p); });
  }
  for (const Row& row : rows) softmax(row.weights, row.last - row.first);
  by_fours(rows, [&](const Row* some, auto n) { values_of_rows<n>(some, lines); });
}

std::vector<Task> tasks_of(const Pages& pages, int64_t tokens, const Shape& s) {
  const int64_t group = s.heads / s.kv_heads, most = std::max<int64_t>(1, ROWS_OF_TASK / group);
  std::vector<Task> tasks;
  for (int64_t t = 0, count; t < tokens; t += count) {
    count = 1;
    while (count < most && t + count < tokens && pages.slots[t + count] == pages.slots[t] &&
           pages.positions[t + count] == pages.positions[t] + count)
      count++;
    for (int64_t h = 0; h < s.kv_heads; h++) tasks.push_back({t, count, h, group, pages.positions[t]});
  }
  return tasks;
}

}  // namespace

#define BY_CACHE_TYPE(type, T, ...)                                                                      \
  switch (type) {                                                                                        \
    CASE(FLOAT32, float, T, __VA_ARGS__) CASE(BFLOAT16, bf16, T, __VA_ARGS__)                              \
    CASE(FLOAT16, f16, T, __VA_ARGS__) CASE(INT8, int8_t, T, __VA_ARGS__)                                  \
    CASE(E4M3, e4m3, T, __VA_ARGS__)                                                                       \
  }

extern "C" {

// Normalises, rotates, writes to the cache and attends: see kernels/__init__.py, Ops.attend.
void fq_attend(const float* qkv, int64_t width, const float* cos_sin, const float* q_scale, const int32_t* positions,
               const int32_t* slots, const int32_t* tables, int64_t table_width, const void* q_norm, const void* k_norm,
               float eps, int norm_type, void* k_cache, void* v_cache, void* k_scale, void* v_scale, int cache_type,
               float* out, int64_t tokens, int64_t window, int64_t heads, int64_t kv_heads, int64_t head_dim,
               int64_t rotary_dim, int64_t block_size) {
  static thread_local std::vector<float> queries;
  const Shape s{heads, kv_heads, head_dim, rotary_dim, block_size, window, shift_of(block_size)};
  const Pages pages{positions, slots, tables, table_width};
  queries.resize(tokens * heads * head_dim);
  float* q = queries.data();
  std::vector<float> norms(q_norm ? 2 * head_dim : 0);
  if (q_norm) BY_TYPE(norm_type, W,
    for (int64_t i = 0; i < head_dim; i++) {
      norms[i] = wide(static_cast<const W*>(q_norm)[i]);
      norms[head_dim + i] = wide(static_cast<const W*>(k_norm)[i]);
    })
  const HeadNorms head_norms{q_norm ? norms.data() : nullptr, q_norm ? norms.data() + head_dim : nullptr, eps};
  const std::vector<Task> tasks = tasks_of(pages, tokens, s);
  BY_CACHE_TYPE(cache_type, C,
    const Cache<C> cache = (Cache<C>{static_cast<C*>(k_cache), static_cast<C*>(v_cache), static_cast<f16*>(k_scale),
                                     static_cast<f16*>(v_scale)});
    rope_all(qkv, width, cos_sin, q_scale, pages, head_norms, cache, q, tokens, s);
    Pool::shared().run(tasks.size(), [&](int64_t i) { attend(tasks[i], q, cache, pages, out, s); }))
}

}

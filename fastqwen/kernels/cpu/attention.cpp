// Attention over the paged cache.
//
// Every sum has an order that depends on its own token alone: which tokens and heads are computed together, and what else is
// in the step, changes nothing. A score is 16 sums over the dimensions i, i + 16, i + 32 .., added up as ``sum`` adds a
// vector's lanes; an output adds its keys' values one after the other.

#include <algorithm>
#include <type_traits>
#include <vector>

#include "cache.h"

namespace {

constexpr int64_t KEYS = LANES;        // as many keys are looked at together, one in each lane
constexpr int ROWS = 4;                // as many queries of a task share what was read of a key
constexpr int64_t SECOND_LEVEL = 1 << 20;  // bytes of a core's cache, about
constexpr int64_t AHEAD = 4 * KEYS;    // keys and values are asked for this many tokens before they are read
constexpr int64_t WIDE_VALUES = 4096;  // as many numbers are made float32 at a time, for all rows of a task
constexpr int64_t FEW_ROWS = 32, MANY_ROWS = 96;  // of a task, unless one token has more heads

// Numbers that begin at a cache line, so that a vector of them is read from one.
class Buffer {
 public:
  void resize(int64_t count) { lines_.resize((count + LANES - 1) / LANES); }
  float* data() { return lines_.empty() ? nullptr : lines_.front().of; }

 private:
  struct alignas(LINE) Numbers { float of[LANES]; };
  std::vector<Numbers> lines_;
};

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

// Two numbers of bfloat16 change places as one of 32 bits, in half as many steps, and are made float32 there. Where it ended.
inline int64_t columns_of_pairs(const Line<bf16> (&keys)[KEYS], int64_t d, float* out) {
  using Words = of_register<uint32_t>;
  int64_t i = 0;
  for (; i + 2 * LANES <= d; i += 2 * LANES) {
    transposed([&](int key, int lane) { return read<of_floats>(keys[key].numbers + i + 2 * lane); },
               [&](int row, int key, of_floats found) {
                 const Words pair = as<Words>(found);
                 float* first = out + (i + 2 * row) * KEYS + key;
                 write(first, as<of_floats>(pair << 16));
                 write(first + KEYS, as<of_floats>(pair & 0xffff0000u));
               });
  }
  return i;
}

// KEYS keys from ``position`` on as columns: out [head_dim, KEYS]. Nobody looks at those in front of ``start`` and from ``end``
// on: others stand in their place.
template <typename C>
void columns_of_keys(const Lines<C>& lines, int64_t position, int64_t start, int64_t end, float* out) {
  const int64_t d = lines.s.head_dim;
  Line<C> keys[KEYS];
  for (int64_t j = 0; j < KEYS; j++) keys[j] = lines.key(std::max(start, std::min(position + j, end - 1)));
  int64_t i = 0;
  if constexpr (std::is_same<C, bf16>::value) i = columns_of_pairs(keys, d, out);
  for (; i + LANES <= d; i += LANES) {
    transposed([&](int key, int lane) { return keys[key].piece(i + lane); },
               [&](int row, int key, of_floats found) { write(out + (i + row) * KEYS + key, found); });
  }
  for (; i < d; i++)
    for (int64_t j = 0; j < KEYS; j++) out[i * KEYS + j] = keys[j].one(i);
}

// Values of the tokens ``first`` to ``last`` - 1 as float32: out [tokens, head_dim].
template <typename C>
void widen_values(const Lines<C>& lines, int64_t first, int64_t last, float* out) {
  const int64_t d = lines.s.head_dim;
  for (int64_t p = first; p < last; p++, out += d) {
    if (p + AHEAD < last) lines.ask_for(lines.cache.v, p + AHEAD);
    const Line<C> line = lines.value(p);
    int64_t i = 0;
    for (; i + LANES <= d; i += LANES) store(out + i, line.at(i));
    for (; i < d; i++) out[i] = line.one(i);
  }
}

// ---- scores ----

template <int N>
struct Many { floats of[N]; };

// The sums over dimensions LANE, LANE + 16, .. of N queries with 16 keys, and of the lanes that are added to it. As ``sum``
// does: lanes that are 8 apart first, then 4, 2, 1. ``d`` is a constant for usual heads: nothing is left of the loops then.
template <int N, int LANE, int STRIDE, typename Size>
INLINE Many<N> lanes_from(const float* q, Size d, const float* keys) {
  if constexpr (STRIDE == LANES) {
    Many<N> acc = {};
    for (int64_t i = LANE; i < d / LANES * LANES; i += LANES) {
      const floats k = load(keys + i * KEYS);
      for (int n = 0; n < N; n++) acc.of[n] += q[n * d + i] * k;
    }
    return acc;
  } else {
    Many<N> a = lanes_from<N, LANE, STRIDE * 2>(q, d, keys);
    const Many<N> b = lanes_from<N, LANE + STRIDE, STRIDE * 2>(q, d, keys);
    for (int n = 0; n < N; n++) a.of[n] += b.of[n];
    return a;
  }
}

template <int N, typename Size>
inline Many<N> scores(const float* q, Size d, const float* keys) {
  Many<N> total = lanes_from<N, 0, 1>(q, d, keys);
  for (int64_t i = d / LANES * LANES; i < d; i++)
    for (int n = 0; n < N; n++) total.of[n] += q[n * d + i] * load(keys + i * KEYS);
  return total;
}

template <int N>
inline Many<N> scores_of(const float* q, int64_t d, const float* keys) {
  switch (d) {
    case 64: return scores<N>(q, std::integral_constant<int64_t, 64>(), keys);
    case 128: return scores<N>(q, std::integral_constant<int64_t, 128>(), keys);
    default: return scores<N>(q, d, keys);
  }
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
  const Many<N> found = scores_of<N>(rows[0].q, d, keys);
  for (int n = 0; n < N; n++) {
    const Row& row = rows[n];
    if (position < row.last && position + KEYS > row.first) store(row.weights + position - row.first, found.of[n] * scale);
  }
}

// Values of the tokens ``first`` to ``last`` - 1 as they are in the cache, or as float32.
template <typename C>
struct CachedValues {
  const Lines<C>& lines;
  int64_t first, last, d;
  void ask_for(int64_t position) const { lines.ask_for(lines.cache.v, position); }
  Line<C> value(int64_t position) const { return lines.value(position); }
};
struct WideValues {
  const float* numbers;
  int64_t first, last, d;
  void ask_for(int64_t) const {}
  Line<float> value(int64_t position) const { return {numbers + (position - first) * d, 1.0f}; }
};

// out += weights * values of the keys first to last - 1, for N rows that see all of them, dimensions ``dim`` on
template <int N, int VECTORS, typename V>
inline void add_values(const Row* rows, const V& values, int64_t first, int64_t last, int64_t dim) {
  floats acc[N][VECTORS];
  for (int n = 0; n < N; n++)
    for (int v = 0; v < VECTORS; v++) acc[n][v] = load(rows[n].out + dim + v * LANES);
  for (int64_t p = first; p < last; p++) {
    if (p + AHEAD < last) values.ask_for(p + AHEAD);
    const auto line = values.value(p);
    for (int v = 0; v < VECTORS; v++) {
      const floats value = line.at(dim + v * LANES);
      for (int n = 0; n < N; n++) acc[n][v] += rows[n].weights[p - rows[n].first] * value;
    }
  }
  for (int n = 0; n < N; n++)
    for (int v = 0; v < VECTORS; v++) store(rows[n].out + dim + v * LANES, acc[n][v]);
}

template <int N, typename V>
void add_all_values(const Row* rows, const V& values, int64_t first, int64_t last) {
  if (first >= last) return;
  const int64_t d = values.d;
  int64_t i = 0;
  for (; i + 4 * LANES <= d; i += 4 * LANES) add_values<N, 4>(rows, values, first, last, i);
  for (; i + LANES <= d; i += LANES) add_values<N, 1>(rows, values, first, last, i);
  for (int64_t p = first; p < last && i < d; p++)
    for (int n = 0; n < N; n++)
      for (int64_t rest = i; rest < d; rest++)
        rows[n].out[rest] = std::fma(rows[n].weights[p - rows[n].first], values.value(p).one(rest), rows[n].out[rest]);
}

template <int N, typename V>
void values_of_rows(const Row* rows, const V& values) {
  int64_t first[N], last[N], begin = values.first, end = values.last;  // of each, and what all of them see
  for (int n = 0; n < N; n++) {
    first[n] = std::max(rows[n].first, values.first);
    last[n] = std::min(rows[n].last, values.last);
    begin = std::max(begin, first[n]);
    end = std::min(end, last[n]);
  }
  end = std::max(begin, end);
  for (int n = 0; n < N; n++) add_all_values<1>(rows + n, values, first[n], std::min(begin, last[n]));
  add_all_values<N>(rows, values, begin, end);
  for (int n = 0; n < N; n++) add_all_values<1>(rows + n, values, std::max(end, first[n]), last[n]);
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
  static thread_local Buffer queries, weights, keys, values;
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
  if (t.rows() <= ROWS) {
    const CachedValues<C> all{lines, start, end, d};
    return by_fours(rows, [&](const Row* some, auto n) { values_of_rows<n>(some, all); });
  }
  const int64_t at_once = std::max<int64_t>(1, WIDE_VALUES / d);
  values.resize(at_once * d);
  for (int64_t p = start; p < end; p += at_once) {
    const int64_t last = std::min(p + at_once, end);
    widen_values(lines, p, last, values.data());
    const WideValues some_values{values.data(), p, last, d};
    by_fours(rows, [&](const Row* some, auto n) { values_of_rows<n>(some, some_values); });
  }
}

// Rows of a task share what is made of keys and values. Their weights are to stay in a cache, and threads to have some tasks each.
int64_t rows_of_task(int64_t keys, int64_t rows) {
  const int64_t cached = SECOND_LEVEL / 2 / sizeof(float) / keys, even = rows / (4 * Pool::shared().threads());
  return std::max(FEW_ROWS, std::min({MANY_ROWS, cached, even}));
}

std::vector<Task> tasks_of(const Pages& pages, int64_t tokens, const Shape& s) {
  const int64_t group = s.heads / s.kv_heads;
  std::vector<Task> tasks;
  for (int64_t t = 0, count; t < tokens; t += count) {
    const int64_t most = rows_of_task(pages.positions[t] + 1, tokens * s.heads) / group;
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

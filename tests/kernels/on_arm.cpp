// A program for another processor: packs a matrix, multiplies with it, and prints the products. What it reads from standard
// input is 12 numbers of 64 bits (kind, halves, zero, shift, inputs, outputs, rows, and which of parts, minima,
// parts of minima there are, bytes of the packed matrix, groups of 16 scales), then codes, scales, parts, minima, their parts, x.

#include <cstdio>
#include <cstdlib>
#include <vector>

#include "packed.cpp"

extern "C" void fq_set_threads(int threads);

template <typename T>
std::vector<T> read(int64_t count) {
  std::vector<T> out(count);
  if (std::fread(out.data(), sizeof(T), count, stdin) != static_cast<size_t>(count)) std::exit(2);
  return out;
}

int main() {
  const std::vector<int64_t> n = read<int64_t>(12);
  const int64_t inputs = n[4], outputs = n[5], rows = n[6], groups = n[11];
  const int64_t parts = outputs / TILE * (inputs / BLOCK) * n[1] * TILE;
  const auto codes = read<uint8_t>(outputs * inputs);
  const auto scales = read<f16>(groups * TILE);
  const auto of_scales = read<int8_t>(n[7] ? parts : 0);
  const auto minima = read<f16>(n[8] ? groups * TILE : 0);
  const auto of_minima = read<uint8_t>(n[9] ? parts : 0);
  const auto x = read<float>(rows * inputs);
  std::vector<uint8_t> packed(n[10]);
  std::vector<float> y(rows * outputs);
  const Matrix w{packed.data(), scales.data(), n[7] ? of_scales.data() : nullptr, n[8] ? minima.data() : nullptr,
                 n[9] ? of_minima.data() : nullptr, nullptr, n[0], n[1], n[2], n[3], inputs, outputs};
  fq_set_threads(2);
  fq_pack(&w, codes.data(), packed.data());
  fq_packed_product(&w, x.data(), nullptr, 0, 0.0f, y.data(), rows, PLAIN);
  std::fwrite(y.data(), sizeof(float), y.size(), stdout);
}

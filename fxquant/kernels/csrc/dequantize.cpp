// In the order of torch's operations, so to the same bits.
#include "dequantize.h"

#include "codes.h"
#include "numbers.h"
#include "threads.h"

namespace fxquant {
namespace {

constexpr double kWeight = 0.5;  // nanoseconds

// What unpacks codes of any width, nibbles too; null for those that are bytes already.
UnpackBytes all_unpacking_of(const Weight& weight) {
  return has_nibbles(weight) ? unpack_bytes_of<4> : unpacking_of(weight);
}

// A group of one block: `count` inputs of `rows` outputs, from its bytes [inputs / 4][64][4].
void write_group(const Weight& weight, const uint8_t* grid, const uint8_t* bytes, int rows, int count,
                 float* to) {
  const auto* scales = reinterpret_cast<const uint16_t*>(grid);
  const float middle = static_cast<float>(weight.middle());
  for (int row = 0; row < rows; ++row, to += weight.in_features) {
    const float scale = from_bf16(scales[row]);
    const float zero = weight.symmetric ? middle : from_f16(scales[NR + row]);
    const uint8_t* code = bytes + kFour * row;
    int k = 0;
    for (; k + kFour <= count; k += kFour, code += kWord) {
      for (int j = 0; j < kFour; ++j) to[k + j] = scale * (static_cast<float>(code[j]) - zero);
    }
    for (int j = 0; k + j < count; ++j) to[k + j] = scale * (static_cast<float>(code[j]) - zero);
  }
}

void write_block(const Weight& weight, int64_t block, float* to) {
  alignas(64) uint8_t unpacked[kMaxGroup * NR];
  const auto unpack = all_unpacking_of(weight);
  const int64_t first_row = block * NR, rows_left = weight.out_features - first_row;
  const int rows = rows_left < NR ? static_cast<int>(rows_left) : NR;
  for (int64_t g = 0; g < weight.groups(); ++g) {
    const uint8_t* grid = weight.data + (block * weight.groups() + g) * weight.group_bytes();
    const uint8_t* codes = grid + weight.grid_bytes();
    if (unpack) {
      unpack(codes, weight.group_size, weight.book, unpacked);
      codes = unpacked;
    }
    const int64_t first = g * weight.group_size, left = weight.in_features - first;
    const int count = left < weight.group_size ? static_cast<int>(left) : weight.group_size;
    write_group(weight, grid, codes, rows, count, to + first_row * weight.in_features + first);
  }
}

}  // namespace

void dequantize(const Weight& weight, float* to, int threads) {
  const auto weights = static_cast<double>(weight.out_features) * weight.in_features;
  const int team = threads_for(kWeight * weights, threads);
#pragma omp parallel for num_threads(team) if (team > 1)
  for (int64_t block = 0; block < weight.blocks(); ++block) write_block(weight, block, to);
}

}  // namespace fxquant

// In the order of torch's operations, so to the same bits; compilers make vectors of these loops.
#include "affine.h"

#include "numbers.h"
#include "threads.h"

namespace fxquant {
namespace {

constexpr int kPart = 1024;       // elements that stay in the nearest cache
constexpr double kElement = 0.5;  // nanoseconds

// Scales and zero points from element `first` of a row on, one for each element.
struct Grid {
  float scales[kPart], zero_points[kPart];

  void fill(const Affine& call, int64_t first, int count) {
    for (int i = 0; i < count; ++i) {
      const int64_t at = call.one_grid ? 0 : first + i;
      scales[i] = call.scales[at], zero_points[i] = call.zero_points[at];
    }
  }
};

void quantize_part(const Affine& call, const Grid& grid, int64_t offset, int count) {
  float x[kPart];
  load_floats(call.x, call.type, offset, count, x);
  for (int i = 0; i < count; ++i) {
    const uint32_t bits = clamped_bits(x[i] / grid.scales[i] + grid.zero_points[i]);
    x[i] = as_float(bits) + 0x1.8p23f;  // rounds to a whole number in the last bits
  }
  uint8_t* q = call.q + offset;
  for (int i = 0; i < count; ++i) q[i] = static_cast<uint8_t>(as_bits(x[i]));
}

void dequantize_part(const Affine& call, const Grid& grid, int64_t offset, int count) {
  float x[kPart];
  const uint8_t* q = call.q + offset;
  for (int i = 0; i < count; ++i) {
    x[i] = grid.scales[i] * (static_cast<float>(q[i]) - grid.zero_points[i]);
  }
  store_floats(x, count, call.x, call.type, offset);
}

// Parts of columns, each for all rows: a grid is filled once for many rows.
template <class Work>
void for_parts(const Affine& call, Work work) {
  const int64_t parts = (call.columns + kPart - 1) / kPart;
  const auto elements = static_cast<double>(call.rows) * call.columns;
  const int team = threads_for(kElement * elements, call.threads);
#pragma omp parallel for num_threads(team) if (team > 1)
  for (int64_t share = 0; share < parts * team; ++share) {
    const int64_t part = share % parts, number = share / parts, first = part * kPart;
    const int64_t left = call.columns - first;
    const int count = left < kPart ? static_cast<int>(left) : kPart;
    Grid grid;
    grid.fill(call, first, count);
    const int64_t end = call.rows * (number + 1) / team;
    for (int64_t row = call.rows * number / team; row < end; ++row) {
      work(grid, row * call.columns + first, count);
    }
  }
}

}  // namespace

void quantize_uint8(const Affine& call) {
  for_parts(call, [&](const Grid& grid, int64_t offset, int count) {
    quantize_part(call, grid, offset, count);
  });
}

void dequantize_uint8(const Affine& call) {
  for_parts(call, [&](const Grid& grid, int64_t offset, int count) {
    dequantize_part(call, grid, offset, count);
  });
}

}  // namespace fxquant

// Channels lie side by side: compilers make vectors of the loops over them.
#include "pooling.h"

#include <cmath>

#include "numbers.h"
#include "threads.h"

namespace fxquant {
namespace {

constexpr int kPart = 64;        // channels that stay in registers or the nearest cache
constexpr double kElement = 0.2;  // nanoseconds

// The places of a window, along one side, that lie in x.
struct Window {
  int64_t begin, end, step;

  static Window of(int64_t place, int64_t size, int64_t kernel, int64_t stride, int64_t dilation,
                   int64_t padding) {
    const int64_t start = place * stride - padding, end = start + (kernel - 1) * dilation + 1;
    const int64_t outside = start < 0 ? (-start + dilation - 1) / dilation : 0;
    return {start + outside * dilation, end < size ? end : size, dilation};
  }
};

inline void keep_larger(const float* x, int64_t count, float* largest) {
  // NaN stays, and takes the place of others.
  for (int64_t i = 0; i < count; ++i) {
    largest[i] = x[i] > largest[i] || x[i] != x[i] ? x[i] : largest[i];
  }
}

void pool_place(const Pooling& call, int64_t sample, const Window& rows, const Window& columns,
                int64_t offset) {
  for (int64_t first = 0; first < call.channels; first += kPart) {
    const int64_t left = call.channels - first, count = left < kPart ? left : kPart;
    float largest[kPart], values[kPart];
    for (float& value : largest) value = -INFINITY;
    for (int64_t row = rows.begin; row < rows.end; row += rows.step) {
      for (int64_t column = columns.begin; column < columns.end; column += columns.step) {
        const int64_t place = (sample * call.size.height + row) * call.size.width + column;
        const int64_t at = place * call.channels + first;
        const float* x = values;
        if (call.type == Float::f32) {
          x = static_cast<const float*>(call.x) + at;
        } else {
          load_floats(call.x, call.type, at, count, values);
        }
        keep_larger(x, count == kPart ? kPart : count, largest);
      }
    }
    store_floats(largest, static_cast<int>(count), call.y, call.type, offset + first);
  }
}

}  // namespace

void pool_largest(const Pooling& call) {
  const int64_t rows = call.batch * call.places.height;
  const double elements = static_cast<double>(rows) * call.places.width * call.channels;
  const int team = threads_for(kElement * elements * call.kernel.height * call.kernel.width, call.threads);
#pragma omp parallel for num_threads(team) if (team > 1)
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t sample = row / call.places.height;
    const Window high = Window::of(row % call.places.height, call.size.height, call.kernel.height,
                                   call.stride.height, call.dilation.height, call.padding.height);
    for (int64_t column = 0; column < call.places.width; ++column) {
      const Window wide = Window::of(column, call.size.width, call.kernel.width, call.stride.width,
                                     call.dilation.width, call.padding.width);
      pool_place(call, sample, high, wide, (row * call.places.width + column) * call.channels);
    }
  }
}

}  // namespace fxquant

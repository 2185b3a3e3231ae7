// Cuts a product into panels of rows and shares of threads.
#include "linear.h"

#include <cmath>

#include "threads.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace fxquant {
namespace {

constexpr double kUnpack = 0.01, kPrepare = 0.2;  // nanoseconds a weight and a value of x
// One thread prepares so many values in 20 microseconds, less than what a barrier may cost.
constexpr int64_t kSmallInput = 1 << 18;
constexpr int64_t kRowsOfThread = 32;  // fewest rows for which a thread reads all of the weight

int threads_of(const Call& call, const Kernel& kernel) {
  const double weights = static_cast<double>(call.weight.out_features) * call.weight.in_features;
  const double values = static_cast<double>(call.rows) * call.weight.in_features;
  const double products = weights * call.rows / kernel.speed;
  return threads_for(kUnpack * weights + kPrepare * values + products, call.threads);
}

bool has_infinite_sum(const Panel& panel, int tile, int row) {
  for (int64_t g = 0; g < panel.groups; ++g) {
    if (!std::isfinite(panel.sums[panel.index(tile, g) + row])) return true;
  }
  return false;
}

void run(const Call& call, const Kernel& kernel, const Panel& panel, int threads) {
  const int64_t inputs = panel.tiles * call.weight.groups();
  const int64_t outputs = call.weight.blocks() * panel.tiles;
  // At a barrier, threads may fall asleep.
  const bool together = threads > 1 && panel.rows * call.weight.in_features >= kSmallInput;
  if (!together) kernel.prepare(call, panel, 0, inputs);
#ifdef _OPENMP
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const int64_t number = omp_get_thread_num(), team = omp_get_num_threads();
    if (together) {
      kernel.prepare(call, panel, inputs * number / team, inputs * (number + 1) / team);
#pragma omp barrier
    }
    kernel.multiply(call, panel, outputs * number / team, outputs * (number + 1) / team);
  }
#else
  if (together) kernel.prepare(call, panel, 0, inputs);
  kernel.multiply(call, panel, 0, outputs);
#endif
}

// Some rows of a call, as a call.
Call rows_of(const Call& call, int64_t first, int64_t rows) {
  const auto bytes = [](Float type) { return type == Float::f32 ? 4 : 2; };
  Call part = call;
  if (call.places.rows) {
    part.places.rows += first;
    if (call.places.scales) part.places.scales += first;
  } else {
    const int64_t skipped = first * call.weight.in_features * bytes(call.x_type);
    part.x = static_cast<const uint8_t*>(call.x) + skipped;
  }
  part.y = static_cast<uint8_t*>(call.y) + first * call.columns() * bytes(call.y_type);
  part.rows = rows;
  return part;
}

bool repeat_portably(const Call& call, int64_t row);

bool linear_in(Scratch& scratch, const Call& call, const InstructionSet& set) {
  const Kernel& kernel = set.kernel_for(call);
  const Weight& weight = call.weight;
  const int64_t groups = weight.groups(), panels = (call.rows + MC - 1) / MC;
  if (panels == 0) return true;
  const int64_t height = (call.rows + panels - 1) / panels;
  // One row of a group more: a kernel may read lower tiles as if they were as high as the others.
  const size_t values = (height * groups + 1) * weight.group_size;
  const size_t value_bytes = values * kernel.value_bytes;
  const size_t grid_bytes = height * groups * sizeof(float);
  uint8_t* memory = scratch.take(value_bytes + 2 * grid_bytes);
  if (!memory) return false;
  auto* scales = reinterpret_cast<float*>(memory + value_bytes);
  float* sums = scales + height * groups;

  for (int64_t number = 0; number < panels; ++number) {
    Panel panel{};
    panel.first_row = call.rows * number / panels;
    panel.rows = static_cast<int>(call.rows * (number + 1) / panels - panel.first_row);
    panel.tiles = (panel.rows + kernel.MR - 1) / kernel.MR;
    panel.groups = groups;
    panel.values = memory, panel.scales = scales, panel.sums = sums;
    run(call, kernel, panel, threads_of(call, kernel));
    if (!kernel.sums_may_cancel || weight.symmetric) continue;
    for (int tile = 0; tile < panel.tiles; ++tile) {
      for (int row = 0; row < panel.height(tile); ++row) {
        const int64_t number_in_call = panel.first_row + panel.tile_start(tile) + row;
        if (has_infinite_sum(panel, tile, row) && !repeat_portably(call, number_in_call)) {
          return false;
        }
      }
    }
  }
  return true;
}

bool repeat_portably(const Call& call, int64_t row) {
  Scratch scratch;  // its own: the caller still reads its panel
  return linear_in(scratch, rows_of(call, row, 1), *portable());
}

bool linear_in_own(const Call& call, const InstructionSet& set) {
  static thread_local Scratch scratch;
  return linear_in(scratch, call, set);
}

}  // namespace

bool linear(const Call& call, const InstructionSet& set) {
  const int threads = threads_of(call, set.kernel_for(call));
  if (threads == 1 || call.rows < kRowsOfThread * threads) return linear_in_own(call, set);
  // Threads that share no rows never wait for each other.
  bool done = true;
#ifdef _OPENMP
#pragma omp parallel num_threads(threads) reduction(&& : done)
  {
    const int64_t number = omp_get_thread_num(), team = omp_get_num_threads();
    const int64_t first = call.rows * number / team, end = call.rows * (number + 1) / team;
    Call part = rows_of(call, first, end - first);
    part.threads = 1;
    done = linear_in_own(part, set);
  }
#else
  done = linear_in_own(call, set);
#endif
  return done;
}

}  // namespace fxquant

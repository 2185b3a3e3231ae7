// Random weights rounded by every instruction set: `make sanitize` runs it under sanitizers. Its
// argument is the number of weights.
//
// The sets must agree to the bit, no group may be worse than with its full range, and every buffer
// has exactly the bytes it needs.
#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

#include "numbers.h"
#include "random_cases.h"
#include "rounding.h"

namespace fxquant {
namespace {

std::mt19937 random_bits(0);

int pick(int from, int to) { return std::uniform_int_distribution<int>(from, to)(random_bits); }

struct Result {
  std::vector<uint8_t> packed;
  std::vector<float> scales, zero_points;

  // To the bit: 0.0 is not -0.0.
  bool operator==(const Result& other) const {
    const size_t bytes = scales.size() * sizeof(float);
    return packed == other.packed && memcmp(scales.data(), other.scales.data(), bytes) == 0 &&
           memcmp(zero_points.data(), other.zero_points.data(), bytes) == 0;
  }
};

bool round_with(const InstructionSet& set, Rounding call, const std::vector<float>& clip_ratios,
                Result* result) {
  const size_t groups = call.rows * call.groups();
  result->packed.resize(call.rows * call.row_bytes());
  result->scales.resize(groups), result->zero_points.resize(groups);
  call.clip_ratios = clip_ratios.data(), call.clip_ratio_count = static_cast<int>(clip_ratios.size());
  call.packed = result->packed.data();
  call.scales = result->scales.data(), call.zero_points = result->zero_points.data();
  return round_groups(call, set, pick(1, 3));
}

// The weighted squared error of each group.
std::vector<double> errors(const Rounding& call, const Result& result) {
  std::vector<double> sums(call.rows * call.groups());
  for (int64_t row = 0; row < call.rows; ++row) {
    for (int64_t k = 0; k < call.columns; ++k) {
      const int64_t group = row * call.groups() + k / call.group_size;
      int code = 0;
      for (int bit = 0; bit < call.bits; ++bit) {
        const int64_t at = k * call.bits + bit;
        code |= (result.packed[row * call.row_bytes() + at / 8] >> (at % 8) & 1) << bit;
      }
      if (call.book) code = call.book->levels[code];
      float x;
      load_floats(call.weight, call.type, row * call.columns + k, 1, &x);
      const double value = result.scales[group] * (code - double(result.zero_points[group]));
      sums[group] += (value - x) * (value - x) * (call.importance ? call.importance[k] : 1);
    }
  }
  return sums;
}

bool is_right() {
  const int sizes[] = {1, 3, 8, 17, 32, 64, 128, 256, 500};
  Rounding call{};
  call.rows = pick(1, 20), call.columns = pick(1, 400);
  call.group_size = std::min<int64_t>(sizes[pick(0, 8)], call.columns);
  call.bits = pick(2, 8), call.symmetric = pick(0, 1), call.whole = pick(0, 1), call.refits = pick(0, 8);
  if (pick(0, 3) == 0) call.bits = kBookBits, call.symmetric = true, call.book = &kCodeBooks[0];
  call.type = static_cast<Float>(pick(0, 2));
  const size_t count = call.rows * call.columns;
  std::vector<uint8_t> weight(count * (call.type == Float::f32 ? 4 : 2));
  std::normal_distribution<float> normal(pick(-1, 1), 1);
  for (size_t i = 0; i < count; ++i) {
    const float value = pick(0, 9) ? normal(random_bits) : pick(0, 1) ? 0.0f : -0.0f;
    store_floats(&value, 1, weight.data(), call.type, i);
  }
  std::vector<float> importance(call.columns);
  for (float& value : importance) value = pick(0, 2) ? std::fabs(normal(random_bits)) : 0;
  call.weight = weight.data();
  call.importance = pick(0, 1) ? importance.data() : nullptr;

  const std::vector<float> full{1.0f};
  std::vector<float> clip_ratios = full;
  for (int i = pick(0, 10); i > 0; --i) clip_ratios.push_back(0.05f * pick(10, 22));
  if (call.book) clip_ratios.push_back(-0.9f);
  Result expected, plain;
  Rounding unfitted = call;
  unfitted.refits = 0;
  if (!round_with(*portable(), call, clip_ratios, &expected)) return false;
  if (!round_with(*portable(), unfitted, full, &plain)) return false;
  for (const InstructionSet* set : instruction_sets()) {
    Result found;
    if (!set) continue;
    if (!round_with(*set, call, clip_ratios, &found) || !(found == expected)) return false;
  }
  const std::vector<double> best = errors(call, expected), most = errors(call, plain);
  for (size_t i = 0; i < best.size(); ++i) {
    // Sums in float32; where no column of a group counts, the error is that of equal weights.
    if (!(best[i] <= most[i] * 1.0001 + 1e-9)) return false;
  }
  return true;
}

}  // namespace
}  // namespace fxquant

int main(int count, char** arguments) {
  return run_random_cases(count, arguments, fxquant::is_right, "a weight is rounded wrongly",
                          "random weights are rounded alike and well");
}

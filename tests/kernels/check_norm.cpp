// Random norms by every instruction set against double: `make sanitize` runs it under sanitizers. Its
// argument is the number of cases. Every buffer has exactly the bytes it needs.
#include <cmath>
#include <random>
#include <vector>

#include "norm.h"
#include "numbers.h"
#include "random_cases.h"

namespace fxquant {
namespace {

std::mt19937 random_bits(0);

int pick(int from, int to) { return std::uniform_int_distribution<int>(from, to)(random_bits); }

struct Numbers {
  std::vector<uint8_t> memory;
  Float type;

  Numbers(int64_t count, Float type, float mean) : memory(count * (type == Float::f32 ? 4 : 2)), type(type) {
    std::normal_distribution<float> normal(mean, 1);
    for (int64_t i = 0; i < count; ++i) {
      const float value = normal(random_bits);
      store_floats(&value, 1, memory.data(), type, i);
    }
  }

  double at(int64_t i) const {
    float value;
    load_floats(memory.data(), type, i, 1, &value);
    return value;
  }
};

bool is_right() {
  Norm call{};
  call.rows = pick(1, 5), call.columns = pick(1, 90), call.type = static_cast<Float>(pick(0, 2));
  call.is_rms = pick(0, 1), call.epsilon = 1e-5f;
  const int64_t count = call.rows * call.columns;
  const Numbers x(count, call.type, 0.5f * pick(-4, 4)), residual(count, call.type, 0);
  const Numbers weight(call.columns, call.type, 1), bias(call.columns, call.type, 0);
  const bool has_residual = pick(0, 2), has_bias = pick(0, 1);
  call.x = x.memory.data(), call.weight = weight.memory.data();
  call.residual = has_residual ? residual.memory.data() : nullptr;
  call.bias = has_bias ? bias.memory.data() : nullptr;
  for (const InstructionSet* set : instruction_sets()) {
    if (!set) continue;
    Numbers sums(count, call.type, 0), y(count, call.type, 0);
    call.y = y.memory.data(), call.sums = has_residual ? sums.memory.data() : nullptr;
    if (!norm(call, *set, pick(1, 3))) return false;
    const double unit = call.type == Float::f32 ? 2e-6 : call.type == Float::bf16 ? 2e-2 : 3e-3;
    for (int64_t row = 0; row < call.rows; ++row) {
      const int64_t start = row * call.columns;
      const auto value = [&](int64_t i) {  // the sum as it is stored
        float sum = static_cast<float>(x.at(start + i) + (has_residual ? residual.at(start + i) : 0));
        uint8_t stored[4];
        store_floats(&sum, 1, stored, call.type, 0);
        load_floats(stored, call.type, 0, 1, &sum);
        return static_cast<double>(sum);
      };
      double mean = 0, variance = 0;
      for (int64_t i = 0; i < call.columns; ++i) mean += value(i) / call.columns;
      if (call.is_rms) mean = 0;
      for (int64_t i = 0; i < call.columns; ++i) {
        variance += (value(i) - mean) * (value(i) - mean) / call.columns;
      }
      for (int64_t i = 0; i < call.columns; ++i) {
        const double normed = (value(i) - mean) / std::sqrt(variance + 1e-5);
        const double expected = normed * weight.at(i) + (has_bias ? bias.at(i) : 0);
        const double error = std::fabs(y.at(start + i) - expected);
        // One column alone has no variance: its rounded mean may be off by a unit.
        const double scale = 1 + std::fabs(expected) + std::fabs(mean) / std::sqrt(variance + 1e-5);
        if (!(error <= unit * scale)) return false;
        if (has_residual && std::fabs(sums.at(start + i) - value(i)) > 1e-6) return false;
      }
    }
  }
  return true;
}

}  // namespace
}  // namespace fxquant

int main(int count, char** arguments) {
  return run_random_cases(count, arguments, fxquant::is_right, "a norm is wrong",
                          "random norms are right");
}

// Random convolutions and poolings by every instruction set against plain loops: `make sanitize` runs
// it under sanitizers. Its argument is the number of cases. Every buffer has exactly the bytes it
// needs, and all instruction sets must give the same bits.
#include "convolution.h"

#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "numbers.h"
#include "pooling.h"
#include "random_cases.h"

namespace fxquant {
namespace {

std::mt19937 random_bits(0);

int pick(int from, int to) { return std::uniform_int_distribution<int>(from, to)(random_bits); }

template <class T>
std::vector<T> numbers(int64_t count, int from, int to, float times = 1) {
  std::vector<T> made(count);
  for (T& number : made) number = static_cast<T>(static_cast<float>(pick(from, to)) * times);
  return made;
}

std::vector<uint8_t> floats(int64_t count, Float type) {
  std::vector<uint8_t> memory(count * (type == Float::f32 ? 4 : 2));
  for (int64_t i = 0; i < count; ++i) {
    const float value = 0.25f * static_cast<float>(pick(-99, 99));
    store_floats(&value, 1, memory.data(), type, i);
  }
  return memory;
}

float at(const void* from, Float type, int64_t i) {
  float value;
  load_floats(from, type, i, 1, &value);
  return value;
}

// Sizes that belong together; `pads` is what is padded behind as well.
template <class Call>
void pick_sizes(Call* call, int most_channels) {
  call->batch = pick(1, 3), call->channels = pick(0, 3) ? pick(1, most_channels) : 64;
  call->size = {pick(1, 9), pick(1, 12)};
  call->stride = {pick(1, 3), pick(1, 3)}, call->dilation = {pick(1, 2), pick(1, 2)};
  call->kernel = {pick(1, 4), pick(1, 4)};
  const auto fit = [](int64_t size, int64_t* kernel, int64_t stride, int64_t dilation,
                      int64_t* padding) {
    *padding = pick(0, static_cast<int>(*kernel / 2));
    while ((*kernel - 1) * dilation + 1 > size + 2 * *padding) --*kernel, *padding = *kernel / 2;
    return (size + 2 * *padding - (*kernel - 1) * dilation - 1) / stride + 1;
  };
  call->places.height = fit(call->size.height, &call->kernel.height, call->stride.height,
                            call->dilation.height, &call->padding.height);
  call->places.width = fit(call->size.width, &call->kernel.width, call->stride.width,
                           call->dilation.width, &call->padding.width);
}

// Calls `use` with the place of x that each place of a kernel reads, or −1 where that is padded.
template <class Call, class Use>
void for_window(const Call& call, int64_t sample, int64_t row, int64_t column, Use use) {
  for (int64_t i = 0; i < call.kernel.height; ++i) {
    for (int64_t j = 0; j < call.kernel.width; ++j) {
      const int64_t y = row * call.stride.height - call.padding.height + i * call.dilation.height;
      const int64_t x = column * call.stride.width - call.padding.width + j * call.dilation.width;
      const bool inside = y >= 0 && y < call.size.height && x >= 0 && x < call.size.width;
      const int64_t place = (sample * call.size.height + y) * call.size.width + x;
      use(i * call.kernel.width + j, inside ? place : -1);
    }
  }
}

bool convolution_is_right() {
  Convolution call{};
  pick_sizes(&call, 70);
  call.outputs = pick(1, 70), call.grids = pick(0, 1) ? 1 : call.batch;
  const int64_t padded = call.padded_outputs(), inputs = call.inputs();
  const auto plain = numbers<int8_t>(call.outputs * inputs, -128, 127);  // [outputs][inputs]
  std::vector<int8_t> weight(padded * call.chunks() * kChunk);
  std::vector<int32_t> sums(padded);
  for (int64_t n = 0; n < call.outputs; ++n) {
    for (int64_t k = 0; k < inputs; ++k) {
      const int64_t lane = n / kLane * call.chunks() * kChunk / 4 + k / 4;
      weight[(lane * kLane + n % kLane) * 4 + k % 4] = plain[n * inputs + k];
      sums[n] += plain[n * inputs + k];
    }
  }
  const auto x = numbers<uint8_t>(call.batch * call.size.height * call.size.width * call.channels, 0, 255);
  const auto scales = numbers<float>(call.grids, 1, 9, 0.125f), weight_scales = numbers<float>(padded, 1, 9, 0.01f);
  auto zero_points = numbers<float>(call.grids, 0, 255);
  call.bias_type = static_cast<Float>(pick(0, 2)), call.residual_type = static_cast<Float>(pick(0, 2));
  call.y_type = static_cast<Float>(pick(0, 2)), call.function = pick(0, 1) ? Function::relu : Function::none;
  const int64_t count = call.rows() * call.outputs;
  const auto bias = floats(call.outputs, call.bias_type), residual = floats(count, call.residual_type);
  const bool has_bias = pick(0, 1), has_residual = pick(0, 1), has_y = pick(0, 3), has_q = !has_y || pick(0, 1);
  const float q_scale = 3, q_zero_point = static_cast<float>(pick(0, 255));
  call.x = x.data(), call.weight = weight.data();
  call.weight_scales = weight_scales.data(), call.weight_sums = sums.data();
  call.scales = scales.data(), call.zero_points = zero_points.data();
  call.bias = has_bias ? bias.data() : nullptr, call.residual = has_residual ? residual.data() : nullptr;
  call.q_scale = &q_scale, call.q_zero_point = &q_zero_point;

  std::vector<uint8_t> y = floats(has_y ? count : 0, call.y_type), q(has_q ? count : 0);
  std::vector<uint8_t> first_y, first_q;
  call.y = has_y ? y.data() : nullptr, call.q = has_q ? q.data() : nullptr;
  for (const InstructionSet* set : instruction_sets()) {
    if (!set) continue;
    if (!convolve(call, *set, pick(1, 3))) return false;
    if (first_y.empty() && first_q.empty()) first_y = y, first_q = q;
    if (y != first_y || q != first_q) return false;
  }
  for (int64_t row = 0; row < call.rows(); ++row) {
    const int64_t column = row % call.places.width, rest = row / call.places.width;
    const int64_t sample = rest / call.places.height, grid = call.grids > 1 ? sample : 0;
    for (int64_t n = 0; n < call.outputs; ++n) {
      double sum = 0;
      for_window(call, sample, rest % call.places.height, column, [&](int64_t k, int64_t place) {
        for (int64_t c = 0; place >= 0 && c < call.channels; ++c) {
          const double value = x[place * call.channels + c] - zero_points[grid];
          sum += value * plain[n * inputs + k * call.channels + c];
        }
      });
      double expected = sum * scales[grid] * weight_scales[n];
      if (has_bias) expected += at(bias.data(), call.bias_type, n);
      const int64_t i = row * call.outputs + n;
      if (has_residual) expected += at(residual.data(), call.residual_type, i);
      if (call.function == Function::relu && expected < 0) expected = 0;
      const double unit = call.y_type == Float::f32 ? 1e-5 : 1e-2;
      if (has_y && std::fabs(at(y.data(), call.y_type, i) - expected) > unit * (1 + std::fabs(expected))) {
        const bool overflows = call.y_type == Float::f16 && std::fabs(expected) > 65000;
        if (!overflows) return false;
      }
      const double rounded = std::fmin(std::fmax(expected / q_scale + q_zero_point, 0), 255);
      if (has_q && std::fabs(q[i] - rounded) > 0.51) return false;
    }
  }
  return true;
}

bool pooling_is_right() {
  Pooling call{};
  pick_sizes(&call, 150);
  call.type = static_cast<Float>(pick(0, 2)), call.threads = pick(1, 3);
  const auto x = floats(call.batch * call.size.height * call.size.width * call.channels, call.type);
  const int64_t places = call.batch * call.places.height * call.places.width;
  auto y = floats(places * call.channels, call.type);
  call.x = x.data(), call.y = y.data();
  pool_largest(call);
  for (int64_t place = 0; place < places; ++place) {
    const int64_t rest = place / call.places.width;
    for (int64_t c = 0; c < call.channels; ++c) {
      float largest = -INFINITY;
      for_window(call, rest / call.places.height, rest % call.places.height, place % call.places.width,
                 [&](int64_t, int64_t from) {
                   if (from >= 0) largest = std::fmax(largest, at(x.data(), call.type, from * call.channels + c));
                 });
      if (at(y.data(), call.type, place * call.channels + c) != largest) return false;
    }
  }
  return true;
}

bool is_right() { return convolution_is_right() && pooling_is_right(); }

}  // namespace
}  // namespace fxquant

int main(int count, char** arguments) {
  return run_random_cases(count, arguments, fxquant::is_right, "a convolution or a pooling is wrong",
                          "random convolutions and poolings are right");
}

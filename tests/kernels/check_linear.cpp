// Random products of every instruction set against sums in double: `make sanitize` runs it under
// sanitizers. Its argument is the number of products for each instruction set.
//
// Every buffer has exactly the bytes it needs, so that reading or writing beyond one is found.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <random>
#include <vector>

#include "codes.h"
#include "dequantize.h"
#include "linear.h"
#include "numbers.h"

namespace fxquant {
namespace {

std::mt19937 random_bits(0);

int pick(int from, int to) { return std::uniform_int_distribution<int>(from, to)(random_bits); }

float normal() { return std::normal_distribution<float>()(random_bits); }

float bad_value() {
  const float infinity = std::numeric_limits<float>::infinity();
  const float values[] = {infinity, -infinity, std::numeric_limits<float>::quiet_NaN()};
  return values[pick(0, 2)];
}

int bytes_of(Float type) { return type == Float::f32 ? 4 : 2; }

// Values as stored in a type, in a buffer without a byte to spare.
struct Values {
  Float type;
  std::vector<uint8_t> data;

  Values(Float type, size_t count) : type(type), data(count * bytes_of(type)) {}

  void set(size_t i, float value) { store_floats(&value, 1, data.data(), type, i); }

  float operator[](size_t i) const {
    float value;
    load_floats(data.data(), type, i, 1, &value);
    return value;
  }
};

struct Case {
  int out, in, rows, group_size, bits;
  const CodeBook* book;
  bool symmetric, int8, has_bias, has_bad;
  Float x_type, bias_type;
};

Case random_case() {
  const int sizes[] = {8, 32, 40, 64, 128, 256}, widths[] = {2, 3, 4, 5, 6, 8};
  Case c{};
  c.out = pick(1, 200), c.in = pick(1, 400), c.rows = pick(0, 3) ? pick(0, 14) : pick(180, 400);
  if (pick(0, 19) == 0) c.out = pick(130, 140), c.in = pick(4300, 5000), c.rows = pick(61, 63);
  if (pick(0, 2) == 0) c.out = NR * pick(1, 3);
  c.bits = pick(0, 1) ? 4 : widths[pick(0, 5)];
  do c.group_size = sizes[pick(0, 5)]; while (c.group_size % unit_of(c.bits) != 0);
  c.book = c.bits == kBookBits && pick(0, 2) == 0 ? &kCodeBooks[0] : nullptr;
  c.symmetric = c.book || pick(0, 1), c.int8 = pick(0, 1), c.has_bias = pick(0, 1);
  c.has_bad = pick(0, 3) == 0;
  c.x_type = static_cast<Float>(pick(0, 2)), c.bias_type = static_cast<Float>(pick(0, 2));
  return c;
}

bool is_close(float y, double expected, double allowed) {
  if (std::isnan(expected)) return std::isnan(y);
  if (std::isinf(expected)) return y == expected;
  return std::fabs(y - expected) <= allowed;
}

// x [in] as the kernel sees it: rounded to int8 by groups (NaN if a value is not finite), or to
// bfloat16.
std::vector<double> seen(const Case& c, const Values& x, int row, bool bf16) {
  std::vector<double> values(c.in);
  for (int start = 0; start < c.in; start += c.group_size) {
    const int end = start + c.group_size < c.in ? start + c.group_size : c.in;
    float largest = 0;
    bool is_finite = true;
    for (int k = start; k < end; ++k) {
      largest = std::fmax(largest, std::fabs(x[row * c.in + k]));
      is_finite = is_finite && std::isfinite(x[row * c.in + k]);
    }
    if (c.int8 && !is_finite) {
      for (int k = start; k < end; ++k) values[k] = std::numeric_limits<double>::quiet_NaN();
      continue;
    }
    const float scale = std::fmax(largest / 127.0f, 0x1p-126f), reciprocal = 1.0f / scale;
    for (int k = start; k < end; ++k) {
      const float value = x[row * c.in + k];
      const double rounded = static_cast<double>(std::nearbyint(value * reciprocal)) * scale;
      values[k] = c.int8 ? rounded : bf16 ? from_bf16(to_bf16(value)) : value;
    }
  }
  return values;
}

// Bit `bit` of the integer of an input of a group, for one output, by the table of codes.h.
int bit_of(const uint8_t* codes, int bits, int input, int output, int bit) {
  const int unit = unit_of(bits), low = low_field(bits), is_high = bit >= low;
  const int field = is_high ? high_field(bits) : low, in_unit = input % unit;
  const int per_word = 32 / field, word = in_unit / per_word + (is_high ? unit * low / 32 : 0);
  const int byte = in_unit % 4, place = in_unit % per_word / 4 * field + bit - is_high * low;
  const int64_t at = input / unit * unit * NR * bits / 8 + word * kWord + 4 * output + byte;
  return codes[at] >> place & 1;
}

int code_of(const uint8_t* codes, int bits, int input, int output) {
  int code = 0;
  for (int bit = 0; bit < bits; ++bit) code |= bit_of(codes, bits, input, output, bit) << bit;
  return code;
}

// Whether the gated product stores the first halves of blocks times the second ones. `y` is what the
// call without the gate gives, in float32.
bool gates_rightly(Call call, const Values& y, const InstructionSet& set) {
  call.is_gated = true;
  Values gated(Float::f32, static_cast<size_t>(call.rows) * call.columns());
  call.y = gated.data.data();
  if (!linear(call, set)) return false;
  for (int64_t i = 0; i < call.rows * call.columns(); ++i) {
    const int64_t first = i / (NR / 2) * NR + i % (NR / 2);
    const float expected = y[first] * y[first + NR / 2];
    if (std::isnan(expected) ? !std::isnan(gated[i]) : gated[i] != expected) return false;
  }
  return true;
}

// Whether rows picked out of the transposed x [in, rows] give the bits that `y` has of x.
bool picks_rightly(Call call, const Values& x, const Values& y, const InstructionSet& set) {
  const int64_t rows = call.rows, in = call.weight.in_features;
  Values transposed(call.x_type, static_cast<size_t>(rows * in));
  std::vector<int64_t> starts(rows);
  std::vector<int32_t> columns(in);
  for (int64_t row = 0; row < rows; ++row) starts[row] = row;
  for (int64_t k = 0; k < in; ++k) columns[k] = static_cast<int32_t>(k * rows);
  for (int64_t i = 0; i < rows * in; ++i) transposed.set(i % in * rows + i / in, x[i]);
  std::vector<uint8_t> picked(y.data.size());
  call.x = transposed.data.data(), call.y = picked.data();
  call.places = {starts.data(), columns.data(), nullptr};
  return linear(call, set) && picked == y.data;
}

// The same of int8 with a scale for each row, against sums in double of the weights `w` [out, in].
bool multiplies_int8_rightly(Call call, const std::vector<double>& w, const InstructionSet& set) {
  const int64_t rows = call.rows, in = call.weight.in_features, out = call.weight.out_features;
  std::vector<int8_t> x(rows * in);
  for (int8_t& value : x) value = static_cast<int8_t>(pick(-127, 127));
  std::vector<int64_t> starts(rows);
  std::vector<int32_t> columns(in);
  std::vector<float> scales(rows), y(rows * out);
  for (int64_t row = 0; row < rows; ++row) starts[row] = row * in, scales[row] = normal();
  for (int64_t k = 0; k < in; ++k) columns[k] = static_cast<int32_t>(in - 1 - k);
  call.x = x.data(), call.y = y.data(), call.y_type = Float::f32, call.bias = nullptr;
  call.int8 = true, call.places = {starts.data(), columns.data(), scales.data()};
  if (!linear(call, set)) return false;
  for (int64_t i = 0; i < rows * out; ++i) {
    double expected = 0, magnitude = 0;
    for (int64_t k = 0; k < in; ++k) {
      const double value = x[i / out * in + in - 1 - k] * static_cast<double>(scales[i / out]);
      const double product = value * w[i % out * in + k];
      expected += product, magnitude += std::fabs(product);
    }
    if (std::fabs(y[i] - expected) > 3e-6 * magnitude + 1e-7) return false;
  }
  return true;
}

bool dequantizes_rightly(const Weight& weight, const std::vector<double>& w) {
  std::vector<float> values(w.size());
  dequantize(weight, values.data(), pick(1, 3));
  for (size_t i = 0; i < w.size(); ++i) {
    if (std::fabs(values[i] - w[i]) > 0x1p-23 * std::fabs(w[i])) return false;
  }
  return true;
}

bool is_right(const Case& c, const InstructionSet& set) {
  Weight weight{nullptr, c.out, c.in, c.group_size, c.symmetric, c.bits, c.book};
  const double middle = weight.middle();
  std::vector<uint8_t> data(weight.blocks() * weight.groups() * weight.group_bytes());
  weight.data = data.data();
  std::vector<double> w(static_cast<size_t>(c.out) * c.in);
  for (int64_t b = 0; b < weight.blocks(); ++b) {
    for (int64_t g = 0; g < weight.groups(); ++g) {
      uint8_t* at = data.data() + (b * weight.groups() + g) * weight.group_bytes();
      uint8_t* codes = at + weight.grid_bytes();
      for (int i = 0; i < c.group_size * NR * c.bits / 8; ++i) codes[i] = pick(0, 255);
      for (int n = 0; n < NR; ++n) {
        const uint16_t scale = to_bf16(normal() * 0.1f), zero_point = to_f16(middle - 0.5f + 2 * normal());
        memcpy(at + 2 * n, &scale, 2);
        if (!c.symmetric) memcpy(at + 2 * NR + 2 * n, &zero_point, 2);
        for (int k = 0; k < c.group_size; ++k) {
          const int64_t row = b * NR + n, column = g * c.group_size + k;
          if (row >= c.out || column >= c.in) continue;
          const double zero = c.symmetric ? middle : from_f16(zero_point);
          const int code = code_of(codes, c.bits, k, n), q = c.book ? c.book->levels[code] : code;
          w[row * c.in + column] = from_bf16(scale) * (q - zero);
        }
      }
    }
  }

  Values x(c.x_type, static_cast<size_t>(c.rows) * c.in), bias(c.bias_type, c.out);
  Values y(c.x_type, static_cast<size_t>(c.rows) * c.out);
  for (size_t i = 0; i < static_cast<size_t>(c.rows) * c.in; ++i) x.set(i, normal() + 0.5f);
  for (int row = 0; row < c.rows && c.has_bad; row += 3) {
    for (int i = pick(1, 2); i > 0; --i) x.set(row * c.in + pick(0, c.in - 1), bad_value());
  }
  for (int n = 0; n < c.out; ++n) bias.set(n, normal());
  const void* added = c.has_bias ? bias.data.data() : nullptr;
  Call call{weight, c.int8,           x.data.data(), c.x_type, added,
            c.bias_type, y.data.data(), c.rows,        Function::none, pick(1, 3)};
  if (!linear(call, set)) return false;
  if (c.int8 && !c.has_bad) {  // integers: the bits do not depend on the instructions
    std::vector<uint8_t> bits(y.data.size());
    call.y = bits.data();
    if (!linear(call, *portable()) || bits != y.data) return false;
  }

  if (!picks_rightly(call, x, y, set) || !multiplies_int8_rightly(call, w, set)) return false;
  if (!dequantizes_rightly(weight, w)) return false;
  if (c.out % NR == 0 && c.x_type == Float::f32 && !gates_rightly(call, y, set)) return false;

  const bool bf16 = set.float_kernel.value_bytes == 2;
  const double ulp = c.x_type == Float::f32 ? 0x1p-24 : c.x_type == Float::bf16 ? 0x1p-8 : 0x1p-11;
  for (int row = 0; row < c.rows; ++row) {
    const std::vector<double> values = seen(c, x, row, bf16);
    for (int n = 0; n < c.out; ++n) {
      double expected = c.has_bias ? bias[n] : 0, magnitude = std::fabs(expected);
      for (int k = 0; k < c.in; ++k) {
        const double product = values[k] * w[static_cast<size_t>(n) * c.in + k];
        expected += product, magnitude += std::fabs(product);
      }
      const double allowed = 1.01 * ulp * std::fabs(expected) + 3e-6 * magnitude + 1e-7;
      if (!is_close(y[static_cast<size_t>(row) * c.out + n], expected, allowed)) return false;
    }
  }
  return true;
}

// float16 has few enough values to try them all; a bfloat16 is the upper half of a float32.
bool conversions_are_right() {
  for (uint32_t half = 0; half < 0x10000; ++half) {
    const auto bits = static_cast<uint16_t>(half);
    const float value = from_f16(bits);
    const bool is_nan = (bits & 0x7fff) > 0x7c00;
    if (is_nan ? !std::isnan(value) || !std::isnan(from_f16(to_f16(value))) : to_f16(value) != bits)
      return false;
    const float upper = from_bf16(bits);
    if (!std::isnan(upper) && to_bf16(upper) != bits) return false;
  }
  return to_f16(65519.0f) == 0x7bff && to_f16(65520.0f) == 0x7c00 && to_f16(0x1p-25f) == 0 &&
         to_f16(0x1.8p-25f) == 1 && to_f16(1 + 0x1p-11f) == 0x3c00 && to_bf16(1 + 0x1p-8f) == 0x3f80;
}

// A number in -2 .. 2 that is the same with every compiler and library.
float plain_value() { return (static_cast<int>(random_bits() >> 16 & 0x7fff) - 0x4000) * 0x1p-13f; }

// A digest of integer products of every width: one number for all instruction sets and CPUs.
uint64_t digest_of_integers(const InstructionSet& set) {
  random_bits.seed(1);
  uint64_t digest = 14695981039346656037u;  // FNV-1a
  for (const int bits : {2, 3, 4, 5, 6, 8}) {
    for (const bool symmetric : {true, false}) {
      Weight weight{nullptr, 150, 300, 64, symmetric, bits};
      std::vector<uint8_t> data(weight.blocks() * weight.groups() * weight.group_bytes());
      for (uint8_t& byte : data) byte = static_cast<uint8_t>(random_bits() >> 24);
      for (int64_t group = 0; group < weight.blocks() * weight.groups(); ++group) {
        uint8_t* at = data.data() + group * weight.group_bytes();
        for (int n = 0; n < NR; ++n) {
          const uint16_t scale = to_bf16(plain_value()), zero_point = to_f16(plain_value());
          memcpy(at + 2 * n, &scale, 2);
          if (!symmetric) memcpy(at + 2 * NR + 2 * n, &zero_point, 2);
        }
      }
      weight.data = data.data();
      std::vector<float> x(13 * 300), y(13 * 150);
      for (float& value : x) value = plain_value();
      const Call call{weight, true, x.data(), Float::f32, nullptr, Float::f32, y.data(), 13, Function::none, 2};
      if (!linear(call, set)) return 0;
      for (const float value : y) digest = (digest ^ as_bits(value)) * 1099511628211u;
    }
  }
  return digest;
}

}  // namespace
}  // namespace fxquant

// Of every instruction set of every CPU. A change of the arithmetic of integers changes it.
constexpr unsigned long long kDigest = 0xb767d20f5310ee52;

int main(int count, char** arguments) {
  using namespace fxquant;
  const int cases = count > 1 ? atoi(arguments[1]) : 200;
  if (!conversions_are_right()) return printf("a conversion is wrong\n"), 1;
  for (const InstructionSet* set : instruction_sets()) {
    if (!set) continue;
    const unsigned long long digest = digest_of_integers(*set);
    if (digest != kDigest) {
      return printf("%s multiplies integers to %016llx\n", set->name, digest), 1;
    }
    for (int i = 0; i < cases; ++i) {
      const Case c = random_case();
      if (is_right(c, *set)) continue;
      printf("%s is wrong: out %d in %d rows %d group %d bits %d symmetric %d int8 %d types %d %d\n",
             set->name, c.out, c.in, c.rows, c.group_size, c.bits, c.symmetric, c.int8,
             static_cast<int>(c.x_type), c.has_bias ? static_cast<int>(c.bias_type) : -1);
      return 1;
    }
    printf("%s: %d random products are right\n", set->name, cases);
  }
  return 0;
}

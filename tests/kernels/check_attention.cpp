// Random attention by every instruction set against double: `make sanitize` runs it under
// sanitizers. Its argument is the number of cases. Every buffer has exactly the bytes it needs.
#include <cmath>
#include <random>
#include <vector>

#include "attention.h"
#include "numbers.h"
#include "random_cases.h"

namespace fxquant {
namespace {

std::mt19937 random_bits(0);

int pick(int from, int to) { return std::uniform_int_distribution<int>(from, to)(random_bits); }

// [batch][heads][rows][columns] somewhere in memory: in that order, or with heads behind rows, and
// perhaps beside the columns of another tensor.
struct Tensor {
  std::vector<uint8_t> memory;
  Matrices matrices;
  Float type;

  Tensor(int64_t batch, int64_t heads, int64_t rows, int64_t columns, Float type) : type(type) {
    const int64_t wide = columns + (pick(0, 1) ? pick(1, 9) : 0);
    const int64_t gap = wide - columns;
    const bool is_transposed = pick(0, 1);
    matrices.batch_stride = heads * rows * wide;
    matrices.head_stride = is_transposed ? wide : rows * wide;
    matrices.row_stride = is_transposed ? heads * wide : wide;
    const int64_t count = batch * heads * rows * wide - gap;
    memory.resize(count * (type == Float::f32 ? 4 : 2));
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < count; ++i) {
      const float value = normal(random_bits);
      store_floats(&value, 1, memory.data(), type, i);
    }
    matrices.data = memory.data();
  }

  double at(int64_t b, int64_t h, int64_t r, int64_t c) const {
    float value;
    const int64_t place = b * matrices.batch_stride + h * matrices.head_stride +
                          r * matrices.row_stride + c;
    load_floats(memory.data(), type, place, 1, &value);
    return value;
  }
};

// A mask of which any dimension may be one for all.
std::vector<uint8_t> make_mask(const Attention& call, Mask* mask) {
  const MaskType types[] = {MaskType::none, MaskType::boolean,
                            static_cast<MaskType>(2 + static_cast<int>(call.type))};
  mask->type = types[pick(0, 2)];
  const int64_t sizes[] = {call.batch, call.heads, call.queries, call.keys};
  int64_t* strides[] = {&mask->batch_stride, &mask->head_stride, &mask->row_stride,
                        &mask->column_stride};
  int64_t count = 1;
  for (int i = 3; i >= 0; --i) {
    const bool is_one_for_all = pick(0, 2) == 0;
    *strides[i] = is_one_for_all ? 0 : count;
    count *= is_one_for_all ? 1 : sizes[i];
  }
  const bool is_boolean = mask->type == MaskType::boolean;
  std::vector<uint8_t> memory(count * (is_boolean ? 1 : call.type == Float::f32 ? 4 : 2));
  for (int64_t i = 0; i < count; ++i) {
    const float value = pick(0, 3) ? 0.25f * pick(-9, 9) : -INFINITY;
    if (is_boolean) {
      memory[i] = pick(0, 2) != 0;
    } else {
      store_floats(&value, 1, memory.data(), call.type, i);
    }
  }
  return memory;
}

double mask_at(const Attention& call, int64_t b, int64_t h, int64_t q, int64_t k) {
  const Mask& mask = call.mask;
  if (call.causal && k > q) return -INFINITY;
  if (mask.type == MaskType::none) return 0;
  const int64_t place = b * mask.batch_stride + h * mask.head_stride + q * mask.row_stride +
                        k * mask.column_stride;
  if (mask.type == MaskType::boolean) return mask.data[place] ? 0 : -INFINITY;
  float value;
  load_floats(mask.data, call.type, place, 1, &value);
  return value;
}

bool row_is_right(const Attention& call, const Tensor& q, const Tensor& k, const Tensor& v,
                  const Tensor& y, int64_t b, int64_t h, int64_t row) {
  const int64_t key_head = h / call.group();
  std::vector<double> scores(call.keys);
  double most = -INFINITY, total = 0;
  for (int64_t key = 0; key < call.keys; ++key) {
    double sum = 0;
    for (int64_t d = 0; d < call.width; ++d) {
      sum += q.at(b, h, row, d) * k.at(b, key_head, key, d);
    }
    scores[key] = sum * call.scale + mask_at(call, b, h, row, key);
    most = scores[key] > most ? scores[key] : most;
  }
  for (double& score : scores) {
    score = most == -INFINITY ? 0 : std::exp(score - most);
    total += score;
  }
  for (int64_t d = 0; d < call.value_width; ++d) {
    double expected = 0;
    for (int64_t key = 0; key < call.keys; ++key) {
      if (total > 0) expected += scores[key] / total * v.at(b, key_head, key, d);
    }
    const double unit = call.type == Float::f32 ? 2e-6 : call.type == Float::bf16 ? 4e-3 : 5e-4;
    const double error = std::fabs(y.at(b, h, row, d) - expected);
    if (!(error <= unit * (1 + std::fabs(expected)))) return false;
  }
  return true;
}

bool is_right() {
  const int counts[] = {1, 2, 5, 12, 13, 40, 128, 129, 200, 300};
  Attention call{};
  call.batch = pick(1, 3), call.key_heads = pick(1, 3), call.heads = call.key_heads * pick(1, 4);
  call.queries = counts[pick(0, 9)], call.keys = counts[pick(0, 9)];
  call.width = pick(1, 70), call.value_width = pick(1, 70);
  call.type = static_cast<Float>(pick(0, 2)), call.scale = 0.02f * pick(1, 20);
  call.causal = pick(0, 1), call.threads = pick(1, 3);
  const Tensor q(call.batch, call.heads, call.queries, call.width, call.type);
  const Tensor k(call.batch, call.key_heads, call.keys, call.width, call.type);
  const Tensor v(call.batch, call.key_heads, call.keys, call.value_width, call.type);
  call.q = q.matrices, call.k = k.matrices, call.v = v.matrices;
  const std::vector<uint8_t> mask = make_mask(call, &call.mask);
  call.mask.data = mask.data();
  for (const InstructionSet* set : instruction_sets()) {
    if (!set) continue;
    const Tensor y(call.batch, call.heads, call.queries, call.value_width, call.type);
    call.y = y.matrices;
    if (!attention(call, *set)) return false;
    for (int turn = 0; turn < 20; ++turn) {
      const int64_t b = pick(0, static_cast<int>(call.batch) - 1);
      const int64_t h = pick(0, static_cast<int>(call.heads) - 1);
      const int64_t row = pick(0, static_cast<int>(call.queries) - 1);
      if (!row_is_right(call, q, k, v, y, b, h, row)) return false;
    }
  }
  return true;
}

}  // namespace
}  // namespace fxquant

int main(int count, char** arguments) {
  return run_random_cases(count, arguments, fxquant::is_right, "an attention is wrong",
                          "random attentions are right");
}

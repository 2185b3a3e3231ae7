// The operators of exported programs, for processes without Python: a library that such a process opens
// before it loads a program. It uses torch's stable ABI alone, so it serves later versions of libtorch.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <cmath>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "../attention_call.h"
#include "../linear.h"
#include "../packed_weight.h"
#include "schemas.h"

namespace fxquant {
namespace {

using torch::headeronly::IntHeaderOnlyArrayRef;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using torch::stable::detail::StableLibrary;

std::optional<Float> float_type(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return Float::f32;
    case ScalarType::BFloat16: return Float::bf16;
    case ScalarType::Half: return Float::f16;
    default: return std::nullopt;
  }
}

std::string shape_of(const Tensor& tensor) {
  std::ostringstream text;
  text << "[";
  for (int64_t i = 0; i < tensor.dim(); ++i) text << (i ? ", " : "") << tensor.size(i);
  text << "]";
  return text.str();
}

[[noreturn]] void refuse(const std::string& found, const char* needed) {
  throw std::runtime_error(found + "; needed: " + needed);
}

void check_memory(bool is_done) {
  if (!is_done) throw std::runtime_error("fxquant: out of memory");
}

Tensor linear_intn(const Tensor& x, const Tensor& weight, std::optional<Tensor> bias,
                   int64_t in_features, int64_t out_features, int64_t bits, bool symmetric,
                   bool int8_activations, int64_t code_book) {
  const std::optional<Float> type = float_type(x.scalar_type());
  if (!x.is_cpu() || !weight.is_cpu() || (bias && !bias->is_cpu()) ||
      weight.scalar_type() != ScalarType::Byte || weight.dim() != 3 || !type) {
    refuse("fxquant::linear_intn: found x " + shape_of(x) + " and weight " + shape_of(weight),
           "a float32, bfloat16 or float16 x and a uint8 weight of three dimensions, on the CPU");
  }
  const Tensor values = torch::stable::contiguous(x), blocks = torch::stable::contiguous(weight);
  Call call{};
  call.weight = weight_of(blocks.data_ptr(), out_features, in_features, blocks.size(2), bits,
                          symmetric, code_book);
  if (x.dim() == 0 || x.size(x.dim() - 1) != in_features ||
      !is_sound(call.weight, blocks.sizes().data()) ||
      (bias && (bias->dim() != 1 || bias->size(0) != out_features))) {
    refuse("fxquant::linear_intn: found x " + shape_of(x) + ", weight " + shape_of(weight) +
               " and bias " + (bias ? shape_of(*bias) : "None") + " for " +
               std::to_string(in_features) + " inputs and " + std::to_string(out_features) +
               " outputs of " + std::to_string(bits) + " bits",
           "a weight packed for the last dimension of x");
  }
  if (bias) {
    if (!float_type(bias->scalar_type())) bias = torch::stable::to(*bias, ScalarType::Float);
    bias = torch::stable::contiguous(*bias);
    call.bias = bias->data_ptr();
    call.bias_type = *float_type(bias->scalar_type());
  }

  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = out_features;
  Tensor y = torch::stable::new_empty(values, shape);
  call.x = values.data_ptr();
  call.x_type = call.y_type = *type;
  call.y = y.data_ptr();
  call.rows = 1;
  for (size_t i = 0; i + 1 < shape.size(); ++i) call.rows *= shape[i];
  call.int8 = int8_activations;
  call.threads = static_cast<int>(torch::stable::get_num_threads());
  check_memory(linear(call, fastest()));
  return y;
}

View view_of(const Tensor& tensor) {
  return {tensor.data_ptr(), tensor.dim(), tensor.sizes().data(), tensor.strides().data()};
}

// torch's operator, with the memory order of ours.
Tensor attend_in_torch(const Tensor& query, const Tensor& key, const Tensor& value,
                       const std::optional<Tensor>& mask, bool is_causal,
                       std::optional<double> scale) {
  if (key.dim() < 2 || value.dim() < 2 || key.size(key.dim() - 2) != value.size(value.dim() - 2)) {
    refuse("fxquant::attention: found keys " + shape_of(key) + " and values " + shape_of(value),
           "a value for each key");
  }
  using torch::stable::detail::from;
  const bool is_grouped = query.dim() == 4 && query.size(1) != key.size(1);
  std::array<StableIValue, 8> stack{from(query), from(key), from(value), from(mask),
                                    from(0.0), from(is_causal), from(scale), from(is_grouped)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::scaled_dot_product_attention", "",
                                                      stack.data(), TORCH_ABI_VERSION));
  const Tensor y = torch::stable::detail::to<Tensor>(stack[0]);
  if (y.dim() != 4) return y;
  const Tensor tokens_first = torch::stable::contiguous(torch::stable::transpose(y, 1, 2));
  return torch::stable::transpose(tokens_first, 1, 2);
}

Tensor attend(const Tensor& query, const Tensor& key, const Tensor& value,
              std::optional<Tensor> mask, bool is_causal, std::optional<double> scale) {
  const ScalarType dtype = query.scalar_type();
  const std::optional<Float> type = float_type(dtype);
  const bool is_boolean = mask && mask->scalar_type() == ScalarType::Bool;
  const bool is_served =
      type && key.scalar_type() == dtype && value.scalar_type() == dtype && query.dim() == 4 &&
      value.dim() == 4 && !(mask && is_causal) &&
      (!mask || is_boolean || mask->scalar_type() == dtype) && query.is_cpu() && key.is_cpu() &&
      value.is_cpu() && (!mask || mask->is_cpu());
  if (is_served) {
    const std::array<int64_t, 4> shape{query.size(0), query.size(2), query.size(1), value.size(3)};
    Tensor y = torch::stable::new_empty(query, shape);
    MaskType mask_type = MaskType::none;
    if (mask) {
      mask_type = is_boolean ? MaskType::boolean
                             : static_cast<MaskType>(static_cast<int>(MaskType::f32) +
                                                     static_cast<int>(*type));
    }
    Attention call{};
    if (read_tensors(view_of(query), view_of(key), view_of(value), y.data_ptr(),
                     mask ? view_of(*mask) : View{}, mask_type, &call)) {
      call.type = *type;
      call.causal = is_causal;
      const double width = static_cast<double>(query.size(3));
      call.scale = static_cast<float>(scale ? *scale : std::pow(width, -0.5));
      call.threads = static_cast<int>(torch::stable::get_num_threads());
      check_memory(attention(call, fastest()));
      return torch::stable::transpose(y, 1, 2);
    }
  }
  return attend_in_torch(query, key, value, mask, is_causal, scale);
}

using Boxed = void (*)(StableIValue*, uint64_t, uint64_t);

// An operator, for as long as the library is open.
class Operator {
 public:
  Operator(const char* schema, const char* key, Boxed kernel) {
    STABLE_TORCH_ERROR_CODE_CHECK(
        aoti_torch_library_init_fragment("fxquant", __FILE__, __LINE__, &definition_));
    // A Python process in which fxquant was imported has the operator already, with the same kernels.
    if (aoti_torch_library_def(definition_, schema) != TORCH_SUCCESS) return;
    kernel_.emplace(StableLibrary::Kind::IMPL, "fxquant", key, __FILE__, __LINE__);
    const std::string text = schema;
    kernel_->impl(text.substr(0, text.find('(')).c_str(), kernel);
  }

  Operator(const Operator&) = delete;
  Operator& operator=(const Operator&) = delete;

  ~Operator() {
    kernel_.reset();
    aoti_torch_delete_library_object(definition_);
  }

 private:
  TorchLibraryHandle definition_ = nullptr;
  std::optional<StableLibrary> kernel_;
};

const Operator linear_operator(kLinearSchema, "CPU", TORCH_BOX(&linear_intn));
const Operator attention_operator(kAttentionSchema, "CompositeExplicitAutograd",
                                  TORCH_BOX(&attend));

}  // namespace
}  // namespace fxquant

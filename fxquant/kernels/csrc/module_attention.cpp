// Attention, for Python.
#include "arguments.h"
#include "attention_call.h"

namespace fxquant {
namespace {

// A tensor given as its sizes and strides.
struct Shape {
  int64_t sizes[8], strides[8];
  Py_ssize_t dimensions;

  // False where there are too many, or with an error set.
  bool read(PyObject* const* values) {
    Py_ssize_t count;
    return read_shape(values[0], sizes, &dimensions) && read_shape(values[1], strides, &count) &&
           count == dimensions;
  }

  View at(void* data) const { return {data, dimensions, sizes, strides}; }
};

}  // namespace

// attention(q, q_sizes, q_strides, k, …, v, …, y, type, mask, mask_type, mask_sizes, mask_strides,
// causal, scale, threads) -> whether the shapes belong together. y is contiguous [batch, queries,
// heads, value width]; addresses and types are those of `linear`, the mask's type is one of MaskType.
PyObject* py_attention(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (!has_count("attention", count, 18)) return nullptr;
  const Arguments given{arguments};
  Shape q, k, v, mask;
  const bool are_read = q.read(arguments + 1) && k.read(arguments + 4) && v.read(arguments + 7) &&
                        mask.read(arguments + 13);
  if (PyErr_Occurred()) return nullptr;
  if (!are_read) Py_RETURN_FALSE;

  Attention call{};
  const auto mask_type = static_cast<MaskType>(given.number(12));
  const bool is_sound =
      read_tensors(q.at(given.address(0)), k.at(given.address(3)), v.at(given.address(6)),
                   given.address(9), mask.at(given.address(11)), mask_type, &call);
  call.type = given.type(10);
  call.causal = given.number(15) != 0;
  call.scale = static_cast<float>(PyFloat_AsDouble(arguments[16]));
  call.threads = static_cast<int>(given.number(17));
  if (PyErr_Occurred()) return nullptr;
  if (!is_sound) Py_RETURN_FALSE;

  const InstructionSet& set = in_use();
  if (!run_released([&] { return attention(call, set); })) return nullptr;
  Py_RETURN_TRUE;
}

}  // namespace fxquant

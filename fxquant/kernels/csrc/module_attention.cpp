// Attention, for Python.
#include "arguments.h"
#include "attention.h"

namespace fxquant {
namespace {

// A tensor [batch, heads, rows, columns] as its address, sizes and strides; its columns lie together.
struct Operand {
  Matrices matrices;
  int64_t sizes[8], strides[8];

  // False where it is no such tensor, or with an error set.
  bool read(PyObject* const* values) {
    Py_ssize_t dimensions, count;
    if (!read_shape(values[1], sizes, &dimensions) || !read_shape(values[2], strides, &count)) {
      return false;
    }
    if (dimensions != 4 || count != 4 || (strides[3] != 1 && sizes[3] != 1)) return false;
    matrices = {static_cast<uint8_t*>(Arguments{values}.address(0)), strides[0], strides[1],
                strides[2]};
    return true;
  }
};

// Reads a mask that broadcasts to [batch, heads, queries, keys]; false where it does not.
bool read_mask(PyObject* const* values, const int64_t* wanted, Mask* mask) {
  int64_t sizes[8], strides[8], found[4] = {};
  Py_ssize_t dimensions, count;
  const Arguments given{values};
  mask->data = static_cast<const uint8_t*>(given.address(0));
  mask->type = static_cast<MaskType>(given.number(1));
  if (mask->type == MaskType::none) return true;
  if (!read_shape(values[2], sizes, &dimensions) || !read_shape(values[3], strides, &count)) {
    return false;
  }
  if (dimensions > 4 || count != dimensions) return false;
  for (Py_ssize_t i = 0; i < dimensions; ++i) {
    const Py_ssize_t to = 4 - dimensions + i;
    if (sizes[i] != wanted[to] && sizes[i] != 1) return false;
    found[to] = sizes[i] == 1 ? 0 : strides[i];
  }
  mask->batch_stride = found[0], mask->head_stride = found[1];
  mask->row_stride = found[2], mask->column_stride = found[3];
  return true;
}

}  // namespace

// attention(q, q_sizes, q_strides, k, …, v, …, y, type, mask, mask_type, mask_sizes, mask_strides,
// causal, scale, threads) -> whether the shapes belong together. y is contiguous [batch, queries,
// heads, value width]; addresses and types are those of `linear`, the mask's type is one of MaskType.
PyObject* py_attention(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (!has_count("attention", count, 18)) return nullptr;
  const Arguments given{arguments};
  Operand q{}, k{}, v{};
  const bool are_read = q.read(arguments) && k.read(arguments + 3) && v.read(arguments + 6);
  if (PyErr_Occurred()) return nullptr;
  if (!are_read) Py_RETURN_FALSE;

  Attention call{};
  call.q = q.matrices, call.k = k.matrices, call.v = v.matrices;
  call.batch = q.sizes[0], call.heads = q.sizes[1], call.key_heads = k.sizes[1];
  call.queries = q.sizes[2], call.keys = k.sizes[2];
  call.width = q.sizes[3], call.value_width = v.sizes[3];
  call.y = {static_cast<uint8_t*>(given.address(9)), call.queries * call.heads * call.value_width,
            call.value_width, call.heads * call.value_width};
  call.type = given.type(10);
  const int64_t scores[4] = {call.batch, call.heads, call.queries, call.keys};
  const bool is_mask = read_mask(arguments + 11, scores, &call.mask);
  call.causal = given.number(15) != 0;
  call.scale = static_cast<float>(PyFloat_AsDouble(arguments[16]));
  call.threads = static_cast<int>(given.number(17));
  if (PyErr_Occurred()) return nullptr;
  const bool is_whole = call.batch > 0 && call.heads > 0 && call.key_heads > 0 &&
                        call.queries > 0 && call.keys > 0 && call.width > 0 && call.value_width > 0;
  if (!is_mask || !is_whole || call.heads % call.key_heads != 0 || k.sizes[0] != call.batch ||
      k.sizes[3] != call.width || v.sizes[0] != call.batch || v.sizes[1] != call.key_heads ||
      v.sizes[2] != call.keys) {
    Py_RETURN_FALSE;
  }

  const InstructionSet& set = in_use();
  if (!run_released([&] { return attention(call, set); })) return nullptr;
  Py_RETURN_TRUE;
}

}  // namespace fxquant

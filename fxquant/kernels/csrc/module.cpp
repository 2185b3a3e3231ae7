// The Python module. Its only state is the instruction set in use.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <algorithm>
#include <vector>

#include "attention.h"
#include "codes.h"
#include "linear.h"
#include "norm.h"
#include "rounding.h"

namespace {

using fxquant::InstructionSet;

const InstructionSet* in_use = nullptr;

struct Candidates {
  const InstructionSet* sets[7] = {fxquant::avx512_bf16(), fxquant::avx512_vnni(),
                                   fxquant::avx2_vnni(),   fxquant::avx2(),
                                   fxquant::neon_dot(),    fxquant::neon(),
                                   fxquant::portable()};
};

const Candidates& candidates() {
  static const Candidates all;
  return all;
}

PyObject* instruction_sets(PyObject*, PyObject*) {
  PyObject* names = PyList_New(0);
  if (!names) return nullptr;
  for (const InstructionSet* set : candidates().sets) {
    if (!set) continue;
    PyObject* name = PyUnicode_FromString(set->name);
    if (!name || PyList_Append(names, name) < 0) {
      Py_XDECREF(name);
      Py_DECREF(names);
      return nullptr;
    }
    Py_DECREF(name);
  }
  return names;
}

PyObject* use(PyObject*, PyObject* name) {
  for (const InstructionSet* set : candidates().sets) {
    if (!set) continue;
    PyObject* candidate = PyUnicode_FromString(set->name);
    if (!candidate) return nullptr;
    const int unequal = PyUnicode_Compare(candidate, name);
    Py_DECREF(candidate);
    if (unequal == 0) {
      in_use = set;
      Py_RETURN_NONE;
    }
  }
  if (!PyErr_Occurred()) PyErr_SetString(PyExc_ValueError, "no such instruction set here");
  return nullptr;
}

// A weight [blocks, groups, bytes of a group]; its group size is 0 where there is no such group.
fxquant::Weight weight_of(const void* data, int64_t out, int64_t in, int64_t group_bytes, int64_t bits,
                          bool symmetric) {
  fxquant::Weight weight{static_cast<const uint8_t*>(data), out, in, 0, symmetric, 0};
  if (bits < 2 || bits > 8 || bits == 7) return weight;
  weight.bits = static_cast<int>(bits);
  const int64_t size = (group_bytes - weight.grid_bytes()) * 8 / (fxquant::NR * bits);
  const bool is_known = size > 0 && size <= fxquant::kMaxGroup &&
                        size % fxquant::unit_of(weight.bits) == 0;
  if (is_known) weight.group_size = static_cast<int>(size);
  return weight;
}

bool is_sound(const fxquant::Weight& weight, const int64_t* shape) {
  return weight.out_features > 0 && weight.in_features > 0 && weight.group_size > 0 &&
         weight.blocks() == shape[0] && weight.groups() == shape[1] &&
         weight.group_bytes() == shape[2];
}

// Reads a tuple of ints; false with an error set, or if there are more than 8.
bool read_shape(PyObject* tuple, int64_t* sizes, Py_ssize_t* count) {
  *count = PyTuple_Size(tuple);
  if (*count < 0 || *count > 8) return false;
  for (Py_ssize_t i = 0; i < *count; ++i) sizes[i] = PyLong_AsLongLong(PyTuple_GetItem(tuple, i));
  return !PyErr_Occurred();
}

// Whole numbers of a call; a wrong one leaves an error set.
struct Arguments {
  PyObject* const* values;

  int64_t number(int i) const { return PyLong_AsLongLong(values[i]); }
  void* address(int i) const { return reinterpret_cast<void*>(number(i)); }
};

// linear(x, x_shape, x_type, bias, bias_type, y, weight, weight_shape, in, out, bits, symmetric, int8,
// function, gated, threads) -> whether the shapes belong together; with addresses as int, types as 0
// (float32), 1 (bfloat16) or 2 (float16), and the function as a number of `Function`.
PyObject* linear(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  constexpr Py_ssize_t kCount = 16;
  if (count != kCount) {
    PyErr_SetString(PyExc_TypeError, "linear takes 16 arguments");
    return nullptr;
  }
  const Arguments given{arguments};
  int64_t x_shape[8], weight_shape[8];
  Py_ssize_t x_dimensions, weight_dimensions;
  const bool shapes = read_shape(arguments[1], x_shape, &x_dimensions) &&
                      read_shape(arguments[7], weight_shape, &weight_dimensions);
  if (PyErr_Occurred()) return nullptr;
  if (!shapes || x_dimensions == 0 || weight_dimensions != 3) Py_RETURN_FALSE;

  fxquant::Call call{};
  call.x = given.address(0);
  call.x_type = static_cast<fxquant::Float>(given.number(2));
  call.bias = given.address(3);
  call.bias_type = static_cast<fxquant::Float>(given.number(4));
  call.y = given.address(5);
  call.rows = 1;
  for (Py_ssize_t i = 0; i + 1 < x_dimensions; ++i) call.rows *= x_shape[i];
  call.weight = weight_of(given.address(6), given.number(9), given.number(8), weight_shape[2],
                          given.number(10), given.number(11) != 0);
  call.int8 = given.number(12) != 0;
  call.function = static_cast<fxquant::Function>(given.number(13));
  call.is_gated = given.number(14) != 0;
  call.threads = static_cast<int>(given.number(15));
  if (PyErr_Occurred()) return nullptr;
  if (x_shape[x_dimensions - 1] != call.weight.in_features ||
      !is_sound(call.weight, weight_shape) ||
      (call.is_gated && call.weight.out_features % fxquant::NR != 0)) {
    Py_RETURN_FALSE;
  }

  const InstructionSet* set = in_use;
  bool done = false;
  Py_BEGIN_ALLOW_THREADS;
  done = fxquant::linear(call, *set);
  Py_END_ALLOW_THREADS;
  if (!done) return PyErr_NoMemory();
  Py_RETURN_TRUE;
}

// A tensor [batch, heads, rows, columns] as its address, sizes and strides; its columns lie together.
struct Operand {
  fxquant::Matrices matrices;
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
bool read_mask(PyObject* const* values, const int64_t* wanted, fxquant::Mask* mask) {
  int64_t sizes[8], strides[8], found[4] = {};
  Py_ssize_t dimensions, count;
  const Arguments given{values};
  mask->data = static_cast<const uint8_t*>(given.address(0));
  mask->type = static_cast<fxquant::MaskType>(given.number(1));
  if (mask->type == fxquant::MaskType::none) return true;
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

// attention(q, q_sizes, q_strides, k, …, v, …, y, type, mask, mask_type, mask_sizes, mask_strides,
// causal, scale, threads) -> whether the shapes belong together. y is contiguous [batch, queries,
// heads, value width]; addresses and types are those of `linear`, the mask's type is one of MaskType.
PyObject* attention(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  constexpr Py_ssize_t kCount = 18;
  if (count != kCount) {
    PyErr_SetString(PyExc_TypeError, "attention takes 18 arguments");
    return nullptr;
  }
  const Arguments given{arguments};
  Operand q{}, k{}, v{};
  const bool are_read = q.read(arguments) && k.read(arguments + 3) && v.read(arguments + 6);
  if (PyErr_Occurred()) return nullptr;
  if (!are_read) Py_RETURN_FALSE;

  fxquant::Attention call{};
  call.q = q.matrices, call.k = k.matrices, call.v = v.matrices;
  call.batch = q.sizes[0], call.heads = q.sizes[1], call.key_heads = k.sizes[1];
  call.queries = q.sizes[2], call.keys = k.sizes[2];
  call.width = q.sizes[3], call.value_width = v.sizes[3];
  call.y = {static_cast<uint8_t*>(given.address(9)), call.queries * call.heads * call.value_width,
            call.value_width, call.heads * call.value_width};
  call.type = static_cast<fxquant::Float>(given.number(10));
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

  const InstructionSet* set = in_use;
  bool done = false;
  Py_BEGIN_ALLOW_THREADS;
  done = fxquant::attention(call, *set);
  Py_END_ALLOW_THREADS;
  if (!done) return PyErr_NoMemory();
  Py_RETURN_TRUE;
}

// norm(x, residual, type, rows, columns, weight, bias, sums, y, is_rms, epsilon, threads): see norm.h;
// addresses and types are those of `linear`.
PyObject* norm(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  constexpr Py_ssize_t kCount = 12;
  if (count != kCount) {
    PyErr_SetString(PyExc_TypeError, "norm takes 12 arguments");
    return nullptr;
  }
  const Arguments given{arguments};
  fxquant::Norm call{};
  call.x = given.address(0), call.residual = given.address(1);
  call.type = static_cast<fxquant::Float>(given.number(2));
  call.rows = given.number(3), call.columns = given.number(4);
  call.weight = given.address(5), call.bias = given.address(6);
  call.sums = given.address(7), call.y = given.address(8);
  call.is_rms = given.number(9) != 0;
  call.epsilon = static_cast<float>(PyFloat_AsDouble(arguments[10]));
  const int threads = static_cast<int>(given.number(11));
  if (PyErr_Occurred()) return nullptr;

  const InstructionSet* set = in_use;
  bool done = false;
  Py_BEGIN_ALLOW_THREADS;
  done = fxquant::norm(call, *set, threads);
  Py_END_ALLOW_THREADS;
  if (!done) return PyErr_NoMemory();
  Py_RETURN_NONE;
}

// Reads a tuple of floats; false with an error set.
bool read_floats(PyObject* tuple, std::vector<float>* values) {
  const Py_ssize_t count = PyTuple_Size(tuple);
  for (Py_ssize_t i = 0; i < count; ++i) {
    values->push_back(static_cast<float>(PyFloat_AsDouble(PyTuple_GetItem(tuple, i))));
  }
  return !PyErr_Occurred();
}

// round_groups(weight, type, rows, columns, group_size, bits, symmetric, whole, importance, clip_ratios,
// refits, packed, scales, zero_points, threads), with addresses and types as for `linear`; importance is
// float32 or 0, scales and zero points are float32.
PyObject* round_groups(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  constexpr Py_ssize_t kCount = 15;
  if (count != kCount) {
    PyErr_SetString(PyExc_TypeError, "round_groups takes 15 arguments");
    return nullptr;
  }
  const Arguments given{arguments};
  std::vector<float> clip_ratios;
  if (!read_floats(arguments[9], &clip_ratios)) return nullptr;

  fxquant::Rounding call{};
  call.weight = given.address(0);
  call.type = static_cast<fxquant::Float>(given.number(1));
  call.rows = given.number(2);
  call.columns = given.number(3);
  call.group_size = std::min<int64_t>(given.number(4), call.columns);
  call.bits = static_cast<int>(given.number(5));
  call.symmetric = given.number(6) != 0;
  call.whole = given.number(7) != 0;
  call.importance = static_cast<const float*>(given.address(8));
  call.clip_ratios = clip_ratios.data();
  call.clip_ratio_count = static_cast<int>(clip_ratios.size());
  call.refits = static_cast<int>(given.number(10));
  call.packed = static_cast<uint8_t*>(given.address(11));
  call.scales = static_cast<float*>(given.address(12));
  call.zero_points = static_cast<float*>(given.address(13));
  const int threads = static_cast<int>(given.number(14));
  if (PyErr_Occurred()) return nullptr;
  if (call.rows < 1 || call.columns < 1 || call.group_size < 1 || call.bits < 1 || call.bits > 8 ||
      clip_ratios.empty() || clip_ratios.size() > fxquant::kMostRanges) {
    PyErr_SetString(PyExc_ValueError, "nothing to round, no such width, or no range or too many to try");
    return nullptr;
  }

  const InstructionSet* set = in_use;
  bool done = false;
  Py_BEGIN_ALLOW_THREADS;
  done = fxquant::round_groups(call, *set, threads);
  Py_END_ALLOW_THREADS;
  if (!done) return PyErr_NoMemory();
  Py_RETURN_NONE;
}

template <class Function>
PyCFunction fast(Function* function) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

PyMethodDef methods[] = {
    {"instruction_sets", instruction_sets, METH_NOARGS,
     "The names of the instruction sets that this build and this CPU have, fastest first."},
    {"use", use, METH_O, "Multiply and round with the instruction set of this name from now on."},
    {"linear", fast(linear), METH_FASTCALL, "Compute a product into memory the caller owns."},
    {"attention", fast(attention), METH_FASTCALL,
     "Compute scaled dot product attention into memory the caller owns."},
    {"norm", fast(norm), METH_FASTCALL, "Add two tensors and norm the rows of their sum."},
    {"round_groups", fast(round_groups), METH_FASTCALL,
     "Round a weight with the best range for each group."},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef definition = {PyModuleDef_HEAD_INIT,
                          "_native",
                          "Matrix products with integer weights, and rounding weights, in C++.",
                          -1,
                          methods,
                          nullptr,
                          nullptr,
                          nullptr,
                          nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__native() {
  for (const InstructionSet* set : candidates().sets) {
    if (!in_use) in_use = set;
  }
  return PyModule_Create(&definition);
}

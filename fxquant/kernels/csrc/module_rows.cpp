// Norms and roundings of rows, for Python.
#include "arguments.h"
#include <algorithm>
#include <vector>

#include "affine.h"
#include "norm.h"
#include "rounding.h"

namespace fxquant {

// norm(x, residual, type, rows, columns, weight, bias, sums, y, is_rms, epsilon, threads): see norm.h;
// addresses and types are those of `linear`.
PyObject* py_norm(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (!has_count("norm", count, 12)) return nullptr;
  const Arguments given{arguments};
  Norm call{};
  call.x = given.address(0), call.residual = given.address(1);
  call.type = given.type(2);
  call.rows = given.number(3), call.columns = given.number(4);
  call.weight = given.address(5), call.bias = given.address(6);
  call.sums = given.address(7), call.y = given.address(8);
  call.is_rms = given.number(9) != 0;
  call.epsilon = static_cast<float>(PyFloat_AsDouble(arguments[10]));
  const int threads = static_cast<int>(given.number(11));
  if (PyErr_Occurred()) return nullptr;

  const InstructionSet& set = in_use();
  if (!run_released([&] { return norm(call, set, threads); })) return nullptr;
  Py_RETURN_NONE;
}

namespace {

// Reads a tuple of floats; false with an error set.
bool read_floats(PyObject* tuple, std::vector<float>* values) {
  const Py_ssize_t count = PyTuple_Size(tuple);
  for (Py_ssize_t i = 0; i < count; ++i) {
    values->push_back(static_cast<float>(PyFloat_AsDouble(PyTuple_GetItem(tuple, i))));
  }
  return !PyErr_Occurred();
}

}  // namespace

// round_groups(weight, type, rows, columns, group_size, bits, code_book, symmetric, whole, importance,
// clip_ratios, refits, packed, scales, zero_points, threads), with addresses, types and code book as for
// `linear`; importance is float32 or 0, scales and zero points are float32.
PyObject* py_round_groups(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (!has_count("round_groups", count, 16)) return nullptr;
  const Arguments given{arguments};
  std::vector<float> clip_ratios;
  if (!read_floats(arguments[10], &clip_ratios)) return nullptr;

  Rounding call{};
  call.weight = given.address(0);
  call.type = given.type(1);
  call.rows = given.number(2);
  call.columns = given.number(3);
  call.group_size = std::min<int64_t>(given.number(4), call.columns);
  call.bits = static_cast<int>(given.number(5));
  const int64_t book = given.number(6);
  call.book = code_book_of(book);
  call.symmetric = given.number(7) != 0;
  call.whole = given.number(8) != 0;
  call.importance = given.floats(9);
  call.clip_ratios = clip_ratios.data();
  call.clip_ratio_count = static_cast<int>(clip_ratios.size());
  call.refits = static_cast<int>(given.number(11));
  call.packed = static_cast<uint8_t*>(given.address(12));
  call.scales = static_cast<float*>(given.address(13));
  call.zero_points = static_cast<float*>(given.address(14));
  const int threads = static_cast<int>(given.number(15));
  if (PyErr_Occurred()) return nullptr;
  if (book != 0 && (!call.book || call.bits != kBookBits || !call.symmetric)) {
    PyErr_SetString(PyExc_ValueError, "no such code book, or not of this width or with zero points");
    return nullptr;
  }
  if (call.rows < 1 || call.columns < 1 || call.group_size < 1 || call.bits < 1 || call.bits > 8 ||
      clip_ratios.empty() || clip_ratios.size() > kMostRanges) {
    PyErr_SetString(PyExc_ValueError, "nothing to round, no such width, or no range or too many to try");
    return nullptr;
  }

  const InstructionSet& set = in_use();
  if (!run_released([&] { return round_groups(call, set, threads); })) return nullptr;
  Py_RETURN_NONE;
}

namespace {

// (x, type, q, rows, columns, scales, zero_points, one_grid, threads): see affine.h.
Affine affine_of(const Arguments& given) {
  Affine call{};
  call.x = given.address(0), call.type = given.type(1);
  call.q = static_cast<uint8_t*>(given.address(2));
  call.rows = given.number(3), call.columns = given.number(4);
  call.scales = given.floats(5), call.zero_points = given.floats(6);
  call.one_grid = given.number(7) != 0;
  call.threads = static_cast<int>(given.number(8));
  return call;
}

PyObject* run_affine(const char* name, void (*work)(const Affine&), PyObject* const* arguments,
                     Py_ssize_t count) {
  if (!has_count(name, count, 9)) return nullptr;
  const Affine call = affine_of(Arguments{arguments});
  if (PyErr_Occurred()) return nullptr;
  const auto whole = [&] {
    work(call);
    return true;
  };
  if (!run_released(whole)) return nullptr;
  Py_RETURN_NONE;
}

}  // namespace

PyObject* py_quantize_uint8(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  return run_affine("quantize_uint8", quantize_uint8, arguments, count);
}

PyObject* py_dequantize_uint8(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  return run_affine("dequantize_uint8", dequantize_uint8, arguments, count);
}

}  // namespace fxquant

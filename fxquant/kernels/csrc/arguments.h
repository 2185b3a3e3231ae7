// What the functions of the Python module share: how they read their arguments, and the instruction set
// in use.
#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "linear.h"

namespace fxquant {

const InstructionSet& in_use();

// Arguments of a call. Addresses are ints, types 0 (float32), 1 (bfloat16) or 2 (float16). A wrong
// argument leaves an error set.
struct Arguments {
  PyObject* const* values;

  int64_t number(int i) const { return PyLong_AsLongLong(values[i]); }
  void* address(int i) const { return reinterpret_cast<void*>(number(i)); }
  const float* floats(int i) const { return static_cast<const float*>(address(i)); }
  Float type(int i) const { return static_cast<Float>(number(i)); }
};

// False, with an error set, where a function that takes `wanted` arguments was given others.
inline bool has_count(const char* name, Py_ssize_t count, Py_ssize_t wanted) {
  if (count == wanted) return true;
  PyErr_Format(PyExc_TypeError, "%s takes %zd arguments", name, wanted);
  return false;
}

// Reads a tuple of ints; false with an error set, or if there are more than 8.
inline bool read_shape(PyObject* tuple, int64_t* sizes, Py_ssize_t* count) {
  *count = PyTuple_Size(tuple);
  if (*count < 0 || *count > 8) return false;
  for (Py_ssize_t i = 0; i < *count; ++i) sizes[i] = PyLong_AsLongLong(PyTuple_GetItem(tuple, i));
  return !PyErr_Occurred();
}

// Runs `work`, which gives false when memory runs out, while other Python threads go on.
template <class Work>
bool run_released(Work work) {
  bool done = false;
  Py_BEGIN_ALLOW_THREADS;
  done = work();
  Py_END_ALLOW_THREADS;
  if (!done) PyErr_NoMemory();
  return done;
}

// The functions of the module; each is described where it is defined.
PyObject* py_linear(PyObject*, PyObject* const* arguments, Py_ssize_t count);
PyObject* py_linear_at(PyObject*, PyObject* const* arguments, Py_ssize_t count);
PyObject* py_dequantize(PyObject*, PyObject* const* arguments, Py_ssize_t count);
PyObject* py_convolve(PyObject*, PyObject* const* arguments, Py_ssize_t count);
PyObject* py_pool_largest(PyObject*, PyObject* const* arguments, Py_ssize_t count);
PyObject* py_attention(PyObject*, PyObject* const* arguments, Py_ssize_t count);
PyObject* py_norm(PyObject*, PyObject* const* arguments, Py_ssize_t count);
PyObject* py_round_groups(PyObject*, PyObject* const* arguments, Py_ssize_t count);
PyObject* py_quantize_uint8(PyObject*, PyObject* const* arguments, Py_ssize_t count);
PyObject* py_dequantize_uint8(PyObject*, PyObject* const* arguments, Py_ssize_t count);

}  // namespace fxquant

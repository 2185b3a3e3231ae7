// The Python module. Its only state is the instruction set in use.
#include "arguments.h"

namespace fxquant {
namespace {

const InstructionSet* chosen = nullptr;

PyObject* names_of_sets(PyObject*, PyObject*) {
  PyObject* names = PyList_New(0);
  if (!names) return nullptr;
  for (const InstructionSet* set : instruction_sets()) {
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
  for (const InstructionSet* set : instruction_sets()) {
    if (!set) continue;
    PyObject* candidate = PyUnicode_FromString(set->name);
    if (!candidate) return nullptr;
    const int unequal = PyUnicode_Compare(candidate, name);
    Py_DECREF(candidate);
    if (unequal == 0) {
      chosen = set;
      Py_RETURN_NONE;
    }
  }
  if (!PyErr_Occurred()) PyErr_SetString(PyExc_ValueError, "no such instruction set here");
  return nullptr;
}

template <class Function>
PyCFunction fast(Function* function) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

PyMethodDef methods[] = {
    {"instruction_sets", names_of_sets, METH_NOARGS,
     "The names of the instruction sets that this build and this CPU have, fastest first."},
    {"use", use, METH_O, "Multiply and round with the instruction set of this name from now on."},
    {"linear", fast(py_linear), METH_FASTCALL, "Compute a product into memory the caller owns."},
    {"linear_at", fast(py_linear_at), METH_FASTCALL,
     "Compute a product with rows that are picked out of memory."},
    {"convolve", fast(py_convolve), METH_FASTCALL,
     "Compute a convolution of integers into memory the caller owns."},
    {"pool_largest", fast(py_pool_largest), METH_FASTCALL,
     "Write the largest value of each window of an image into memory the caller owns."},
    {"dequantize", fast(py_dequantize), METH_FASTCALL,
     "Write the values of a packed weight into memory the caller owns."},
    {"attention", fast(py_attention), METH_FASTCALL,
     "Compute scaled dot product attention into memory the caller owns."},
    {"norm", fast(py_norm), METH_FASTCALL, "Add two tensors and norm the rows of their sum."},
    {"round_groups", fast(py_round_groups), METH_FASTCALL,
     "Round a weight with the best range for each group."},
    {"quantize_uint8", fast(py_quantize_uint8), METH_FASTCALL,
     "Round floats to uint8 with given scales and zero points."},
    {"dequantize_uint8", fast(py_dequantize_uint8), METH_FASTCALL,
     "Write the floats of such integers."},
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

const InstructionSet& in_use() { return *chosen; }

}  // namespace fxquant

PyMODINIT_FUNC PyInit__native() {
  using namespace fxquant;
  if (!chosen) chosen = &fastest();
  return PyModule_Create(&definition);
}

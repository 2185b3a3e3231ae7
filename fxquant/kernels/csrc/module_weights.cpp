// Products with packed weights, and their values, for Python.
#include "arguments.h"
#include "dequantize.h"
#include "packed_weight.h"

namespace fxquant {
// linear(x, x_shape, x_type, bias, bias_type, y, weight, weight_shape, in, out, bits, symmetric,
// code_book, int8, function, gated, threads) -> whether the shapes belong together; with addresses as
// int, types as 0 (float32), 1 (bfloat16) or 2 (float16), the code book as its place in `kCodeBooks` from
// 1 on, or 0, and the function as a number of `Function`.
PyObject* py_linear(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (!has_count("linear", count, 17)) return nullptr;
  const Arguments given{arguments};
  int64_t x_shape[8], weight_shape[8];
  Py_ssize_t x_dimensions, weight_dimensions;
  const bool shapes = read_shape(arguments[1], x_shape, &x_dimensions) &&
                      read_shape(arguments[7], weight_shape, &weight_dimensions);
  if (PyErr_Occurred()) return nullptr;
  if (!shapes || x_dimensions == 0 || weight_dimensions != 3) Py_RETURN_FALSE;

  Call call{};
  call.x = given.address(0);
  call.x_type = call.y_type = given.type(2);
  call.bias = given.address(3);
  call.bias_type = given.type(4);
  call.y = given.address(5);
  call.rows = 1;
  for (Py_ssize_t i = 0; i + 1 < x_dimensions; ++i) call.rows *= x_shape[i];
  call.weight = weight_of(given.address(6), given.number(9), given.number(8), weight_shape[2],
                          given.number(10), given.number(11) != 0, given.number(12));
  call.int8 = given.number(13) != 0;
  call.function = static_cast<Function>(given.number(14));
  call.is_gated = given.number(15) != 0;
  call.threads = static_cast<int>(given.number(16));
  if (PyErr_Occurred()) return nullptr;
  if (x_shape[x_dimensions - 1] != call.weight.in_features ||
      !is_sound(call.weight, weight_shape) ||
      (call.is_gated && call.weight.out_features % NR != 0)) {
    Py_RETURN_FALSE;
  }

  const InstructionSet& set = in_use();
  if (!run_released([&] { return linear(call, set); })) return nullptr;
  Py_RETURN_TRUE;
}

// linear_at(x, x_type, rows, row_count, columns, row_scales, bias, bias_type, y, y_type, weight,
// weight_shape, in, out, bits, symmetric, code_book, int8, threads) -> whether the shapes belong together;
// see `Places`. With row_scales, x is int8, x_type means nothing and int8 is true.
PyObject* py_linear_at(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (!has_count("linear_at", count, 19)) return nullptr;
  const Arguments given{arguments};
  int64_t shape[8];
  Py_ssize_t dimensions;
  const bool is_shape = read_shape(arguments[11], shape, &dimensions) && dimensions == 3;
  if (PyErr_Occurred()) return nullptr;
  if (!is_shape) Py_RETURN_FALSE;

  Call call{};
  call.x = given.address(0), call.x_type = given.type(1);
  call.places.rows = static_cast<const int64_t*>(given.address(2));
  call.rows = given.number(3);
  call.places.columns = static_cast<const int32_t*>(given.address(4));
  call.places.scales = given.floats(5);
  call.bias = given.address(6), call.bias_type = given.type(7);
  call.y = given.address(8), call.y_type = given.type(9);
  call.weight = weight_of(given.address(10), given.number(13), given.number(12), shape[2],
                          given.number(14), given.number(15) != 0, given.number(16));
  call.int8 = given.number(17) != 0;
  call.threads = static_cast<int>(given.number(18));
  if (PyErr_Occurred()) return nullptr;
  if (!is_sound(call.weight, shape) || (call.places.scales && !call.int8)) Py_RETURN_FALSE;

  const InstructionSet& set = in_use();
  if (!run_released([&] { return linear(call, set); })) return nullptr;
  Py_RETURN_TRUE;
}

// dequantize(weight, weight_shape, in, out, bits, symmetric, code_book, y, threads) -> whether the shapes
// belong together; y is float32 [out, in].
PyObject* py_dequantize(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (!has_count("dequantize", count, 9)) return nullptr;
  const Arguments given{arguments};
  int64_t shape[8];
  Py_ssize_t dimensions;
  const bool is_shape = read_shape(arguments[1], shape, &dimensions) && dimensions == 3;
  if (PyErr_Occurred()) return nullptr;
  if (!is_shape) Py_RETURN_FALSE;

  const Weight weight = weight_of(given.address(0), given.number(3), given.number(2), shape[2],
                                  given.number(4), given.number(5) != 0, given.number(6));
  auto* to = static_cast<float*>(given.address(7));
  const int threads = static_cast<int>(given.number(8));
  if (PyErr_Occurred()) return nullptr;
  if (!is_sound(weight, shape)) Py_RETURN_FALSE;

  const auto work = [&] {
    dequantize(weight, to, threads);
    return true;
  };
  if (!run_released(work)) return nullptr;
  Py_RETURN_TRUE;
}

}  // namespace fxquant

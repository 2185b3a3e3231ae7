// Convolutions of integers, for Python.
#include "arguments.h"
#include "convolution.h"
#include "pooling.h"

namespace fxquant {
namespace {

Pair pair_at(const int64_t* sizes) { return {sizes[0], sizes[1]}; }

bool is_sound(const Convolution& call) {
  const bool has_sizes = call.batch >= 0 && call.channels > 0 && call.outputs > 0 &&
                         call.size.height > 0 && call.size.width > 0;
  for (const Pair& pair : {call.kernel, call.stride, call.dilation, call.places}) {
    if (pair.height < 1 || pair.width < 1) return false;
  }
  return has_sizes && call.inputs() <= kMostInputs && call.function >= Function::none &&
         call.function <= Function::tanh && (call.grids == 1 || call.grids == call.batch);
}

}  // namespace

// convolve(x, x_shape, geometry, places, weight, weight_scales, weight_sums, bias, bias_type, scales,
// zero_points, grids, residual, residual_type, function, y, y_type, q, q_scale, q_zero_point, threads)
// -> whether the sizes belong together; see `Convolution`. x_shape is (batch, height, width, channels),
// geometry has the kernel, strides, dilations and paddings, and places (height, width, outputs).
PyObject* py_convolve(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (!has_count("convolve", count, 21)) return nullptr;
  const Arguments given{arguments};
  int64_t shape[8], geometry[8], places[8];
  Py_ssize_t dimensions, numbers, sizes;
  const bool are_shapes = read_shape(arguments[1], shape, &dimensions) &&
                          read_shape(arguments[2], geometry, &numbers) &&
                          read_shape(arguments[3], places, &sizes);
  if (PyErr_Occurred()) return nullptr;
  if (!are_shapes || dimensions != 4 || numbers != 8 || sizes != 3) Py_RETURN_FALSE;

  Convolution call{};
  call.x = static_cast<const uint8_t*>(given.address(0));
  call.batch = shape[0], call.size = pair_at(shape + 1), call.channels = shape[3];
  call.kernel = pair_at(geometry), call.stride = pair_at(geometry + 2);
  call.dilation = pair_at(geometry + 4), call.padding = pair_at(geometry + 6);
  call.places = pair_at(places), call.outputs = places[2];
  call.weight = static_cast<const int8_t*>(given.address(4));
  call.weight_scales = given.floats(5);
  call.weight_sums = static_cast<const int32_t*>(given.address(6));
  call.bias = given.address(7), call.bias_type = given.type(8);
  call.scales = given.floats(9), call.zero_points = given.floats(10);
  call.grids = given.number(11);
  call.residual = given.address(12), call.residual_type = given.type(13);
  call.function = static_cast<Function>(given.number(14));
  call.y = given.address(15), call.y_type = given.type(16);
  call.q = static_cast<uint8_t*>(given.address(17));
  call.q_scale = given.floats(18), call.q_zero_point = given.floats(19);
  const int threads = static_cast<int>(given.number(20));
  if (PyErr_Occurred()) return nullptr;
  if (!is_sound(call)) Py_RETURN_FALSE;

  const InstructionSet& set = in_use();
  if (!run_released([&] { return convolve(call, set, threads); })) return nullptr;
  Py_RETURN_TRUE;
}

// pool_largest(x, type, x_shape, geometry, places, y, threads) -> whether the sizes belong together; see
// `Pooling`. x_shape and geometry are those of `convolve`, and places is (height, width).
PyObject* py_pool_largest(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (!has_count("pool_largest", count, 7)) return nullptr;
  const Arguments given{arguments};
  int64_t shape[8], geometry[8], places[8];
  Py_ssize_t dimensions, numbers, sizes;
  const bool are_shapes = read_shape(arguments[2], shape, &dimensions) &&
                          read_shape(arguments[3], geometry, &numbers) &&
                          read_shape(arguments[4], places, &sizes);
  if (PyErr_Occurred()) return nullptr;
  if (!are_shapes || dimensions != 4 || numbers != 8 || sizes != 2) Py_RETURN_FALSE;

  Pooling call{};
  call.x = given.address(0), call.type = given.type(1);
  call.batch = shape[0], call.size = pair_at(shape + 1), call.channels = shape[3];
  call.kernel = pair_at(geometry), call.stride = pair_at(geometry + 2);
  call.dilation = pair_at(geometry + 4), call.padding = pair_at(geometry + 6);
  call.places = pair_at(places), call.y = given.address(5);
  call.threads = static_cast<int>(given.number(6));
  if (PyErr_Occurred()) return nullptr;
  for (const Pair& pair : {call.kernel, call.stride, call.dilation}) {
    if (pair.height < 1 || pair.width < 1) Py_RETURN_FALSE;
  }
  const auto work = [&] {
    pool_largest(call);
    return true;
  };
  if (!run_released(work)) return nullptr;
  Py_RETURN_TRUE;
}

}  // namespace fxquant

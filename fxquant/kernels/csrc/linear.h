// The matrix product y = x · wᵀ + bias with integer weights of 2 to 8 bits: what is asked for, and
// what an instruction set offers.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

#include "code_books.h"

namespace fxquant {

// The names of the sizes of tiles are those of BLIS and XNNPACK.
constexpr int NR = 64;         // outputs of a block: the rows of the weight that are kept together
constexpr int KR = 8;          // inputs that are multiplied in one turn of a loop
constexpr int kMaxGroup = 256; // inputs of a group
constexpr int MC = 192;        // rows of x that are prepared at a time

enum class Float : int { f32, bf16, f16 };

// What is applied to each output; see activation.h.
enum class Function : int { none, relu, gelu, gelu_tanh, silu, tanh };

// A weight, cut into blocks of 64 outputs and groups of inputs. A (block, group) is contiguous:
//   scales       bfloat16 [64]
//   zero points  float16 [64], absent where every zero point is the middle
//   codes        see codes.h
struct Weight {
  const uint8_t* data;
  int64_t out_features;
  int64_t in_features;
  int group_size;
  bool symmetric;
  int bits;  // of a code: 2, 3, 4, 5, 6 or 8
  const CodeBook* book = nullptr;  // what codes stand for; null where they are the integers themselves

  int middle() const { return book ? kBookMiddle : 1 << (bits - 1); }
  int64_t groups() const { return (in_features + group_size - 1) / group_size; }
  int64_t blocks() const { return (out_features + NR - 1) / NR; }
  int steps() const { return group_size / KR; }
  int64_t grid_bytes() const { return NR * (symmetric ? 2 : 4); }
  int64_t group_bytes() const {
    return grid_bytes() + static_cast<int64_t>(steps()) * NR * bits;
  }
};

// Where the rows of x are picked out of memory, as the patches of a convolution are: the element k of a
// row is x[rows[row] + columns[k]].
struct Places {
  const int64_t* rows;
  const int32_t* columns;
  const float* scales;  // [rows], of an x of int8 in −127 .. 127; null where x holds floats
};

struct Call {
  Weight weight;
  bool int8;  // whether activations are rounded to int8, one scale for each row and group
  const void* x;
  Float x_type;
  const void* bias;  // may be null
  Float bias_type;
  void* y;  // [rows, columns()]
  int64_t rows;
  Function function;
  int threads;
  // Whether of each block the function of the first half times the second half is stored, so that y
  // has half as many columns; out_features is then a multiple of 64.
  bool is_gated = false;
  Float y_type = x_type;
  Places places{};  // all null where x is a matrix [rows, in_features]

  int64_t columns() const { return weight.out_features / (is_gated ? 2 : 1); }
};

// Some rows of x in the form an instruction set multiplies. They form tiles of almost equal height,
// one after another in memory.
struct Panel {
  int64_t first_row;
  int rows;
  int tiles;
  int64_t groups;
  uint8_t* values;  // of a tile: [group][step][row][8] or [group][row][step][8], int8, bfloat16 or float32
  float* scales;    // of a tile: [group][row]; of int8 values
  float* sums;      // of a tile: [group][row]; of the values as prepared

  int tile_start(int tile) const {
    const int base = rows / tiles, extra = rows % tiles;
    return tile * base + (tile < extra ? tile : extra);
  }

  int height(int tile) const { return tile_start(tile + 1) - tile_start(tile); }

  // Where the first row of a tile's group is, counted in rows of groups.
  int64_t index(int tile, int64_t group) const {
    return tile_start(tile) * groups + group * height(tile);
  }
};

// One instruction set and kind of activation.
struct Kernel {
  int MR;           // at most so many rows in a tile
  int value_bytes;  // of a prepared value
  int speed;        // about so many multiplications in a nanosecond
  // Whether a zero point other than the middle is taken off as a multiple of Σ x: then an infinite
  // x would give ∞ − ∞, and its row is left to the portable kernel.
  bool sums_may_cancel;
  // Fills the pairs (tile, group) numbered first .. last - 1 of the panel, groups varying fastest.
  void (*prepare)(const Call&, const Panel&, int64_t first, int64_t last);
  // Computes the pairs (block, tile) numbered first .. last - 1, tiles varying fastest.
  void (*multiply)(const Call&, const Panel&, int64_t first, int64_t last);
};

struct Attention;
struct Convolution;
struct Norm;
struct Rounding;

// The part `number` of work that so many threads share.
struct Share {
  int64_t number, team;
};

struct InstructionSet {
  const char* name;
  Kernel float_kernel;
  Kernel int8_kernel;
  // See rounding.h: rounds the rows first .. last - 1 of a weight.
  void (*round_rows)(const Rounding&, int64_t first, int64_t last, uint8_t* scratch);
  // See attention.h: computes the units first .. last - 1.
  void (*attend)(const Attention&, int64_t first, int64_t last, uint8_t* scratch);
  int64_t (*attention_scratch_bytes)(const Attention&);
  // See norm.h: norms the rows first .. last - 1.
  void (*norm_rows)(const Norm&, int64_t first, int64_t last, uint8_t* scratch);
  int64_t (*norm_scratch_bytes)(const Norm&);
  // See convolution.h: computes a share of the outputs.
  void (*convolve)(const Convolution&, Share, uint8_t* scratch);
  int64_t (*convolution_scratch_bytes)(const Convolution&);
  // Takes the place of the int8 kernel, with the same bits, from so many rows on.
  int64_t many_rows = INT64_MAX;
  Kernel many_rows_int8_kernel{};

  const Kernel& kernel_for(const Call& call) const {
    if (!call.int8) return float_kernel;
    return call.rows < many_rows ? int8_kernel : many_rows_int8_kernel;
  }
};

// Null where the compiler or the CPU does not have it.
const InstructionSet* amx();
const InstructionSet* avx512_bf16();
const InstructionSet* avx512_vnni();
const InstructionSet* avx2_vnni();
const InstructionSet* avx2();
const InstructionSet* neon_dot();
const InstructionSet* neon();
const InstructionSet* portable();

// All of them, the fastest first; null where the compiler or the CPU does not have one.
using InstructionSets = std::array<const InstructionSet*, 8>;
const InstructionSets& instruction_sets();

// The first that there is.
const InstructionSet& fastest();

// False when memory runs out.
bool linear(const Call& call, const InstructionSet& set);

}  // namespace fxquant

// AMX, the matrix unit of server CPUs: tiles of at most 16 rows by 64 outputs, in bfloat16 and in int8.
// All else is as with AVX-512 and BF16, which such CPUs have too.
#include "cpu.h"
#include "linear.h"
#include "targets.h"

#ifdef FXQUANT_X86

#include <immintrin.h>  // not compiled for more instructions itself

FXQUANT_TARGET(
    "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16,avx2,fma,f16c,"
    "amx-tile,amx-bf16,amx-int8")

#define FXQUANT_AVX512_BF16
#include "avx512.h"
#include "bf16_pairs.h"

namespace fxquant {
namespace {

constexpr int kUnitRows = 16, kUnitRowBytes = 64;  // of a tile of the unit, and of its rows, at most
// From here on the unit pays for int8, whose sums need more work than their products.
constexpr int kManyRows = 24;

// What each of the unit's eight tiles is, in the form that LDTILECFG reads: 0 to 3 are sums of 16
// outputs each, 4 has values of x, and 5 to 7 have codes.
struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes_of_row[16] = {};
  uint8_t rows[16] = {};

  // For values of so many rows, of which one product takes `chunk` bytes.
  TileShapes(int height, int chunk) {
    for (int tile = 0; tile < 8; ++tile) {
      bytes_of_row[tile] = static_cast<uint16_t>(tile == 4 ? chunk : kUnitRowBytes);
      rows[tile] = static_cast<uint8_t>(tile <= 4 ? height : chunk / kFour);
    }
  }
};

// How many bytes of a row of a group are multiplied at once: a power of two that divides them.
inline int chunk_of(int row_bytes) {
  int chunk = kUnitRowBytes;
  while (row_bytes % chunk != 0) chunk /= 2;
  return chunk;
}

// Codes of a group as one product takes them: of `kUnitRows` words at most.
constexpr int kChunkCodes = kUnitRows * kWord;

// A `Product` says what is multiplied, and what a group's sums add to the outputs:
//   Value, Sum             the types of a prepared value and of a sum
//   speed, prepare_...     as of a `Mode`, see blocked.h
//   dot<V>()               adds the products with a vector of outputs to tile V
//   add(...)               adds the product of a group to 16 outputs of a row
//   unpack_nibbles(...)    makes of nibbles what the unit multiplies
//   unpack_wider(bits)     what does so with codes of other widths
template <class Product>
struct MatrixUnit : Product {
  using Value = typename Product::Value;
  using Sum = typename Product::Sum;
  static constexpr int MR = kUnitRows, float_tiles = 0, code_bytes = sizeof(Value);
  static constexpr bool rows_apart = true;

  static void begin(const Weight& weight, int tallest) {
    const TileShapes shapes(tallest, chunk_of(weight.group_size * sizeof(Value)));
    asm volatile("ldtilecfg %0" ::"m"(shapes));  // GCC 12's own function reads eight bytes only
  }

  // A unit that is at rest makes switching threads cheap.
  static void end() { _tile_release(); }

  // For one tile, nibbles are unpacked where they are used; for several, once for all of them.
  static UnpackBytes unpacking(const Weight& weight, int tiles) {
    if (weight.bits == 4) return tiles == 1 ? nullptr : Product::unpack_nibbles;
    return Product::unpack_wider(weight);
  }

  template <int R, bool Bytes>
  static void multiply(const Span& span, float* outputs) {
    // Two, so that sums of one group are added up while the unit multiplies the next.
    alignas(64) Sum sums[2][kUnitRows * NR];
    for (int i = 0; i < span.groups; ++i) {
      multiply_group<Bytes>(span.tile(i).values, span.group(i).codes, span);
      if (i > 0) add<R>(span, i - 1, sums[(i - 1) % 2], outputs);
      store(sums[i % 2]);
    }
    add<R>(span, span.groups - 1, sums[(span.groups - 1) % 2], outputs);
  }

  template <bool Bytes>
  static void multiply_group(const uint8_t* x, const uint8_t* codes, const Span& span) {
    const int row_bytes = span.steps * KR * static_cast<int>(sizeof(Value));
    const int chunk = chunk_of(row_bytes), inputs = chunk / static_cast<int>(sizeof(Value));
    alignas(64) uint8_t unpacked[2][kChunkCodes];
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int at = 0, turn = 0; at < row_bytes; at += chunk, turn ^= 1) {
      const uint8_t* from = codes;
      if (Bytes) {
        codes += chunk / kFour * kWord;
      } else {
        Product::unpack_nibbles(codes, inputs, span.book, unpacked[turn]);
        from = unpacked[turn], codes += inputs / KR * kWord;
      }
      asm volatile("" ::: "memory");  // GCC 12 does not know that loading a tile reads memory
      _tile_loadd(4, x + at, row_bytes);
      _tile_loadd(5, from, kWord);
      Product::template dot<0>();
      _tile_loadd(6, from + 64, kWord);
      Product::template dot<1>();
      _tile_loadd(7, from + 128, kWord);
      Product::template dot<2>();
      _tile_loadd(5, from + 192, kWord);
      Product::template dot<3>();
    }
  }

  static void store(Sum* sums) {
    constexpr int kStride = NR * sizeof(Sum);
    _tile_stored(0, sums, kStride);
    _tile_stored(1, sums + 16, kStride);
    _tile_stored(2, sums + 32, kStride);
    _tile_stored(3, sums + 48, kStride);
  }

  template <int R>
  static void add(const Span& span, int i, const Sum* sums, float* outputs) {
    const Group group = span.group(i);
    const TileGroup tile = span.tile(i);
    if (group.zero_points) {
      add_rows<R, true>(group, tile, sums, outputs);
    } else {
      add_rows<R, false>(group, tile, sums, outputs);
    }
  }

  template <int R, bool HasOffset>
  static void add_rows(const Group& group, const TileGroup& tile, const Sum* sums, float* outputs) {
    __m512 scales[kVectors], offsets[kVectors];
    unrolled<kVectors>([&](auto v) {
      scales[v] = scales_at(group, v);
      if (HasOffset) offsets[v] = offset_at(group, v);
    });
    for (int r = 0; r < R; ++r, sums += NR, outputs += NR) {
      unrolled<kVectors>([&](auto v) {
        const __m512 total = _mm512_load_ps(outputs + 16 * v);
        const __m512 sum = Product::template add<HasOffset>(sums + 16 * v, offsets[v], tile, r,
                                                            scales[v], total);
        _mm512_store_ps(outputs + 16 * v, sum);
      });
    }
  }
};

struct Bf16Product : Bf16Pairs {
  using Sum = float;
  static constexpr int speed = 600;

  template <int V>
  static void dot() {
    if constexpr (V == 0) _tile_dpbf16ps(0, 4, 5);  // GCC takes only literal numbers
    if constexpr (V == 1) _tile_dpbf16ps(1, 4, 6);
    if constexpr (V == 2) _tile_dpbf16ps(2, 4, 7);
    if constexpr (V == 3) _tile_dpbf16ps(3, 4, 5);
  }

  template <bool HasOffset>
  static __m512 add(const float* sums, __m512 offset, const TileGroup& tile, int r, __m512 scales,
                    __m512 total) {
    __m512 product = _mm512_load_ps(sums);
    if (HasOffset) product = _mm512_fmadd_ps(offset, _mm512_set1_ps(tile.sums[r]), product);
    return _mm512_fmadd_ps(product, scales, total);
  }

  static UnpackBytes unpack_wider(const Weight& weight) { return unpacking(weight, 1); }
};

struct Int8Product {
  using Value = int8_t;
  using Sum = int32_t;
  static constexpr int speed = 1000;
  static constexpr bool sums_may_cancel = false;

  static void prepare_group(const float* x, int size, int8_t* to, int stride, float* scale,
                            float* sum) {
    Int8Mode::prepare_group(x, size, to, stride, scale, sum);
  }

  template <int V>
  static void dot() {
    if constexpr (V == 0) _tile_dpbssd(0, 4, 5);  // GCC takes only literal numbers
    if constexpr (V == 1) _tile_dpbssd(1, 4, 6);
    if constexpr (V == 2) _tile_dpbssd(2, 4, 7);
    if constexpr (V == 3) _tile_dpbssd(3, 4, 5);
  }

  // The order of `int8_product`.
  template <bool HasOffset>
  static __m512 add(const int32_t* sums, __m512 offset, const TileGroup& tile, int r, __m512 scales,
                    __m512 total) {
    __m512 product = _mm512_cvtepi32_ps(_mm512_load_si512(sums));
    if (HasOffset) {
      const __m512 part = _mm512_mul_ps(offset, _mm512_set1_ps(tile.sums[r]));
      product = _mm512_add_ps(product, part);
    }
    product = _mm512_mul_ps(product, _mm512_set1_ps(tile.scales[r]));
    return _mm512_add_ps(total, _mm512_mul_ps(product, scales));
  }

  static void unpack_nibbles(const uint8_t* codes, int inputs, const CodeBook* book,
                             uint8_t* bytes) {
    const auto unpack = book ? unpack_signed<unpack_book, kBookMiddle> : unpack_integers<4>;
    unpack(codes, inputs, book, bytes);
  }

  static UnpackBytes unpack_wider(const Weight& weight) {
    switch (weight.bits) {
      case 2: return unpack_integers<2>;
      case 3: return unpack_integers<3>;
      case 5: return unpack_integers<5>;
      case 6: return unpack_integers<6>;
      default: return unpack_integers<8>;
    }
  }

  template <int Bits>
  static void unpack_integers(const uint8_t* codes, int inputs, const CodeBook* book,
                              uint8_t* bytes) {
    unpack_signed<unpack_bytes_of<Bits>, 1 << (Bits - 1)>(codes, inputs, book, bytes);
  }

  // Signed bytes [inputs / 4][64][4] of q − middle.
  template <UnpackBytes Unpack, int Middle>
  static void unpack_signed(const uint8_t* codes, int inputs, const CodeBook* book, uint8_t* bytes) {
    const __m512i middles = _mm512_set1_epi8(static_cast<char>(Middle));
    Unpack(codes, inputs, book, bytes);
    for (int at = 0; at < inputs * NR; at += 64) {
      _mm512_store_si512(bytes + at, _mm512_sub_epi8(load(bytes + at), middles));
    }
  }
};

// Products of bytes, for `convolution_rows.h`: two tiles of patches times two of the weight.
struct UnitDots {
  static constexpr int kRows = 2 * kUnitRows, kTakenOff = 0;

  static void begin() {
    const TileShapes shapes(kUnitRows, kUnitRowBytes);
    asm volatile("ldtilecfg %0" ::"m"(shapes));
  }

  static void end() { _tile_release(); }

  static void multiply(const uint8_t* x, int64_t stride, int rows, const int8_t* weight, int chunks,
                       int32_t* sums) {
    constexpr int kTile = kChunk * kLane, kStride = kSlab * sizeof(int32_t);
    const int8_t* second = weight + static_cast<int64_t>(chunks) * kTile;
    const bool has_two = rows > kUnitRows;
    asm volatile("" ::: "memory");  // GCC 12 does not know that loading a tile reads memory
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int chunk = 0; chunk < chunks; ++chunk, x += kChunk, weight += kTile, second += kTile) {
      _tile_loadd(4, x, stride);
      _tile_loadd(6, weight, kUnitRowBytes);
      _tile_dpbusd(0, 4, 6);
      _tile_loadd(7, second, kUnitRowBytes);
      _tile_dpbusd(1, 4, 7);
      if (!has_two) continue;
      _tile_loadd(5, x + kUnitRows * stride, stride);
      _tile_dpbusd(2, 5, 6);
      _tile_dpbusd(3, 5, 7);
    }
    _tile_stored(0, sums, kStride);
    _tile_stored(1, sums + kLane, kStride);
    if (!has_two) return;
    _tile_stored(2, sums + kUnitRows * kSlab, kStride);
    _tile_stored(3, sums + kUnitRows * kSlab + kLane, kStride);
  }
};

}  // namespace

const InstructionSet* amx() {
  static const InstructionSet* set = [] {
    const InstructionSet* others = has_amx() ? avx512_bf16() : nullptr;
    if (!others) return others;
    static InstructionSet own = *others;
    own.name = "amx", own.float_kernel = kernel_of<MatrixUnit<Bf16Product>>();
    own.convolve = convolve_rows<UnitDots>;
    own.convolution_scratch_bytes = convolution_bytes<UnitDots>;
    own.many_rows = kManyRows, own.many_rows_int8_kernel = kernel_of<MatrixUnit<Int8Product>>();
    return static_cast<const InstructionSet*>(&own);
  }();
  return set;
}

}  // namespace fxquant

FXQUANT_END

#else

namespace fxquant {
const InstructionSet* amx() { return nullptr; }
}  // namespace fxquant

#endif

// Code books: the 16 levels, counted from 128, that codes of 4 bits stand for. Python says the same in
// numerics/code_books.py, where it is explained; the self-test of kernels/native.py compares the two.
#pragma once

#include <cstdint>

namespace fxquant {

constexpr int kBookBits = 4, kBookLevels = 1 << kBookBits, kBookMiddle = 128;

struct CodeBook {
  alignas(16) uint8_t levels[kBookLevels];
  alignas(64) float values[kBookLevels] = {};  // less the middle

  constexpr explicit CodeBook(const uint8_t (&given)[kBookLevels]) : levels() {
    for (int i = 0; i < kBookLevels; ++i) {
      levels[i] = given[i], values[i] = static_cast<float>(given[i] - kBookMiddle);
    }
  }
};

inline constexpr CodeBook kCodeBooks[] = {
    CodeBook({1, 40, 61, 78, 92, 105, 116, 128, 138, 148, 159, 171, 184, 199, 220, 255}),  // nf4
};

// The book of a number, as callers from outside know it; null where there is none.
inline const CodeBook* code_book_of(int64_t number) {
  const int64_t count = sizeof(kCodeBooks) / sizeof(kCodeBooks[0]);
  return number < 1 || number > count ? nullptr : &kCodeBooks[number - 1];
}

}  // namespace fxquant

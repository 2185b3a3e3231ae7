// FXQUANT_TARGET("...") compiles what follows, up to FXQUANT_END, for more instructions than the
// rest of the module needs. Only code in anonymous namespaces may follow: the linker keeps one copy
// of an inline function, and it must not be one that an older CPU cannot run.
//
// FXQUANT_DOT_PRODUCT is what the compiler calls the dot product of bytes on Arm.
//
// A file that does so defines FXQUANT_AVX512 or the like as well: GCC's own macros, such as
// __AVX2__, do not follow the pragma in C++ before GCC 13.
#pragma once

// Here, so that later includes find them done.
#include <cmath>
#include <cstring>
#include <type_traits>

#if defined(__clang__)
#define FXQUANT_KNOWS_TARGETS (__clang_major__ >= 12)
#elif defined(__GNUC__)
#define FXQUANT_KNOWS_TARGETS (__GNUC__ >= 11)  // the first with AVX-VNNI
#else
#define FXQUANT_KNOWS_TARGETS 0
#endif

#if FXQUANT_KNOWS_TARGETS
#if defined(__x86_64__)
#define FXQUANT_X86 1
#elif defined(__aarch64__)
#define FXQUANT_ARM 1
#endif
#define FXQUANT_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define FXQUANT_DOT_PRODUCT "dotprod"
#define FXQUANT_TARGET(features) \
  FXQUANT_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define FXQUANT_END _Pragma("clang attribute pop")
#else
#define FXQUANT_DOT_PRODUCT "arch=armv8.2-a+dotprod"  // as its own header says
#define FXQUANT_TARGET(features) \
  _Pragma("GCC push_options") FXQUANT_PRAGMA(GCC target(features))
#define FXQUANT_END _Pragma("GCC pop_options")
#endif
#endif

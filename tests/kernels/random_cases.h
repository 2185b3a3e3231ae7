// The `main` of the checks that draw one random case after the other.
#pragma once

#include <cstdio>
#include <cstdlib>

// Draws as many cases as the first argument says, 200 by default; 1 if one of them is wrong.
inline int run_random_cases(int count, char** arguments, bool (*is_right)(), const char* wrong,
                            const char* right) {
  const int cases = count > 1 ? atoi(arguments[1]) : 200;
  for (int i = 0; i < cases; ++i) {
    if (!is_right()) return printf("case %d: %s\n", i, wrong), 1;
  }
  printf("%d %s\n", cases, right);
  return 0;
}

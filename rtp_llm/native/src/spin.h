// What threads and ranks do while they wait for each other.
#pragma once
#include <time.h>

inline double now() {
  timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
}

inline void pause_cpu() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

constexpr int CHECKS_PER_LOOK = 32;  // of what is awaited, between looks at the clock

// Waits until is_over() is true, for `seconds` at most. Returns whether it is.
template <class Condition>
bool spin_until(Condition is_over, double seconds) {
  for (double start = now(); now() - start < seconds;)
    for (int i = 0; i < CHECKS_PER_LOOK; i++) {
      if (is_over()) return true;
      pause_cpu();
    }
  return false;
}

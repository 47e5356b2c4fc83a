// Calls of kernels by a list of recorded arguments, see rtp_llm/native/tape.py.
#pragma once
#include <cstdint>
#include <cstring>
#include <utility>

template <class T>
T argument_of(uint64_t slot) {
  T value;
  std::memcpy(&value, &slot, sizeof value);
  return value;
}

template <class... A, size_t... I>
void call_with(void (*kernel)(A...), const uint64_t* slots, std::index_sequence<I...>) {
  kernel(argument_of<A>(slots[I])...);
}

template <class... A>
void call_with(void (*kernel)(A...), const uint64_t* slots) {
  call_with(kernel, slots, std::index_sequence_for<A...>());
}

// Defines the function that calls `kernel` with arguments in slots of 8 bytes.
#define RTP_REPLAYABLE(kernel) \
  RTP_API void kernel##_replay(const uint64_t* slots) { call_with(kernel, slots); }

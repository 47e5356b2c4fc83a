#include "replay.h"

#include "native.h"

namespace {

struct Call {
  void (*replay)(const uint64_t* slots);
  const uint64_t* slots;
};

}  // namespace

RTP_API void rtp_replay(const Call* calls, int64_t num_calls) {
  for (int64_t i = 0; i < num_calls; i++) calls[i].replay(calls[i].slots);
}

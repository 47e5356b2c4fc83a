#include "native.h"

RTP_API const char* rtp_level() { return RTP_LEVEL; }

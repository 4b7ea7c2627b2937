// attention_decode and recycle_head on a GPU: recycle/attention.h and recycle/head.h with all arrays in its memory.
// Nothing waits for the GPU, so what is out of range can only show in the results.
#pragma once

#include "recycle/attention.h"
#include "recycle/head.h"
#include "step.h"

namespace recycle::cuda {

int64_t attention_scratch_bytes(const AttentionParams& params);
// Sequences whose length is out of range get NaN, and nothing is written to their cache.
bool attention_decode(const AttentionParams& params, const Device& device, void* stream);

int64_t head_scratch_bytes(const HeadParams& params, const Device& device);
// A row with a logit that is NaN or infinite gets token -1 and log-probability NaN.
bool recycle_head(const HeadParams& params, const Device& device, void* stream);

}  // namespace recycle::cuda

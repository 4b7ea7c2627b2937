// The ops on a GPU: recycle/{attention,head,decode_step}.h with all arrays in the GPU's memory.
//
// A call launches kernels and returns; false: CUDA refused a launch. Nothing waits for the GPU, nothing is allocated,
// and the launches depend on sizes alone, so that a CUDA graph can hold them. Values in the GPU's memory that are out
// of range show in the results alone. *_scratch_bytes(): the size of params.scratch or state.scratch.
#pragma once

#include "device_info.h"
#include "recycle/attention.h"
#include "recycle/decode_step.h"

namespace recycle::cuda {

// Bytes of shared memory that a block of attention needs, in attention_decode() and decode_step().
int64_t attention_shared_bytes(CacheType type, int64_t head_dim);

int64_t attention_scratch_bytes(const AttentionParams& params);
// A sequence whose length is out of range gets NaN, and its cache is unchanged.
bool attention_decode(const AttentionParams& params, const Device& device, void* stream);

// Tokens of a vocabulary that can be sampled from: more would overflow the histograms of sampling.cu.
inline constexpr int64_t kMaxSampledTokens = int64_t{1} << 18;
// Sequences times key/value heads: blocks along y of attention's grid.
inline constexpr int64_t kMaxAttentionHeads = 65535;

int64_t head_scratch_bytes(const HeadParams& params, const Device& device);
// A row with a nonfinite logit gets token -1 and log-probability NaN.
bool recycle_head(const HeadParams& params, const Device& device, void* stream);

int64_t decode_scratch_bytes(const Model& model, int64_t batch, int64_t num_draft_tokens, bool greedy,
                             const Device& device);
// A sequence that fails gets a negative count (select.h), and its state is unchanged.
bool decode_step(const DecodeState& state, int64_t* tokens, int64_t* counts, const Device& device, void* stream);
// The end of a prefill: a step of `sequence` alone, whose caches hold its prompt except for the last token. That
// token is pending[sequence][0], both lengths are its position, and there are no draft tokens yet. Afterwards the
// sequence has its first new token and draft tokens.
bool finish_prefill(const DecodeState& state, int64_t sequence, int64_t* tokens, int64_t* counts, const Device& device,
                    void* stream);

}  // namespace recycle::cuda

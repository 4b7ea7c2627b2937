// decode_step on a GPU: recycle/decode_step.h with all arrays in its memory, as a row of kernels in one stream.
#pragma once

#include <cstdint>

#include "recycle/decode_step.h"

namespace recycle::cuda {

// Of the current GPU.
struct Device {
  int multiprocessors = 1;
  bool overlap = false;  // may start a kernel before the one before it is done (Hopper and later)
  int64_t shared_bytes = 48 * 1024;  // of memory a block may have
};

// Bytes of GPU memory that decode_step() works in.
int64_t decode_scratch_bytes(const Model& model, int64_t batch, int64_t drafts, bool greedy,
                             const Device& device);

// Shared memory that attention needs a block.
int64_t attention_shared_bytes(CacheType type, int64_t head_dim);

// Starts the step and returns: nothing waits for the GPU, nothing is allocated, and which kernels start depends on
// the sizes alone, so that a CUDA graph can hold it. tokens [batch, drafts + 1], counts [batch], in GPU memory;
// counts[b] < 0: see select.h. False: CUDA refused to start a kernel.
bool decode_step(const DecodeState& state, int64_t* tokens, int64_t* counts, const Device& device,
                 void* stream);

// The end of a prefill: a step of `sequence` alone, whose caches hold all of its prompt but the last token. That is
// pending[sequence][0], both lengths its position; there are no drafts yet. The sequence grows by its first new
// token, and has drafts afterwards.
bool finish_prefill(const DecodeState& state, int64_t sequence, int64_t* tokens, int64_t* counts,
                    const Device& device, void* stream);

}  // namespace recycle::cuda

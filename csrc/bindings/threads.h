// The number of threads of the calls that name none: attention_decode, recycle_head, and decoders of models without a
// number of their own.
#pragma once

namespace recycle::bindings {

// What set_n_threads() has set; else default_threads(), or fewer where torch runs on fewer (OMP_NUM_THREADS,
// torch.set_num_threads).
int n_threads();
// 1 to kMaxThreads; 0: the default again.
void set_n_threads(int n);

}  // namespace recycle::bindings

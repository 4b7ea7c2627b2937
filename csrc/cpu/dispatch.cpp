// Compiled without any instruction set flags: it must run everywhere.
// Chooses the kernels' instruction set at run time: the best of this build that the processor can run.
#include "kernels.h"

#include <atomic>
#include <cstring>

#include "recycle/parallel.h"

namespace recycle {

// Defined by kernels/table.h; those that this build lacks are not used below.
namespace generic {
extern const Kernels kTable;
}
namespace avx2 {
extern const Kernels kTable;
}
namespace avxvnni {
extern const Kernels kTable;
}
namespace avx512 {
extern const Kernels kTable;
}

namespace {

int runnable(const Kernels* tables[kMaxIsas]) {
  int count = 0;
  tables[count++] = &generic::kTable;
#ifdef RECYCLE_HAVE_AVX2
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
    tables[count++] = &avx2::kTable;
#endif
#ifdef RECYCLE_HAVE_AVXVNNI
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
      __builtin_cpu_supports("avxvnni"))
    tables[count++] = &avxvnni::kTable;
#endif
#ifdef RECYCLE_HAVE_AVX512
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni"))
    tables[count++] = &avx512::kTable;
#endif
  return count;
}

const Kernels* best() {
  const Kernels* tables[kMaxIsas];
  return tables[runnable(tables) - 1];
}

std::atomic<const Kernels*> chosen{nullptr};  // null: the best

}  // namespace

const Kernels& kernels() {
  static const Kernels* const fallback = best();
  const Kernels* table = chosen.load(std::memory_order_relaxed);
  return table != nullptr ? *table : *fallback;
}

bool force_isa(const char* name) {
  // The kernels of one call belong together: each set has its own layout of quantized activations.
  const ParallelPause pause;
  if (name == nullptr) {
    chosen.store(nullptr, std::memory_order_relaxed);
    return true;
  }
  const Kernels* tables[kMaxIsas];
  const int count = runnable(tables);
  for (int i = 0; i < count; ++i) {
    if (std::strcmp(tables[i]->name, name) == 0) {
      chosen.store(tables[i], std::memory_order_relaxed);
      return true;
    }
  }
  return false;
}

int runnable_isas(const char* names[kMaxIsas]) {
  const Kernels* tables[kMaxIsas];
  const int count = runnable(tables);
  for (int i = 0; i < count; ++i) names[i] = tables[i]->name;
  return count;
}

}  // namespace recycle

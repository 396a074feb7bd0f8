// The threads of a call: OpenMP's, or one.
#pragma once

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace xsep::cpu {

// f(thread, threads) in each of `count` threads, or of as many as there are.
template <class F>
void in_parallel(int count, F&& f) {
#if defined(_OPENMP)
#pragma omp parallel num_threads(count)
  f(omp_get_thread_num(), omp_get_num_threads());
#else
  static_cast<void>(count);
  f(0, 1);
#endif
}

// Inside of it: waits for all threads.
inline void barrier() {
#if defined(_OPENMP)
#pragma omp barrier
#endif
}

}  // namespace xsep::cpu

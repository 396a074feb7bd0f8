// Mean and m2 of a tensor's channels on the CPU, as the training block makes those of its result: tiles of some pixels
// are staged as panels, whose statistics join those of the tiles before by Chan's formula, in double.
//
// Bytes: x once.  A thread takes a contiguous run of the rows, so that results depend on the number of threads.

#include "../moments.h"

#include <algorithm>
#include <cstring>

#include "call.h"
#include "isa.h"
#include "parallel.h"
#include "separable_plan.h"
#include "statistics.h"

namespace xsep::cpu {
namespace {

constexpr int kPixels = 128;  // of a tile; eight panels of them are 64 KB
constexpr int64_t kElementsPerThread = 16 * 1024;

// Offsets into a thread's memory, in elements of the accumulation type.
struct MomentsPlan {
  MomentsPlan(const MomentsArgs& args, int block)
      : blocks((args.C + block - 1) / block), rows(int64_t{args.N} * args.H) {
    const int64_t elements = rows * args.W * args.C;
    threads = static_cast<int>(std::clamp<int64_t>(elements / kElementsPerThread, 1, args.threads));
    const int in_double = block == 8 ? 1 : 2;
    Regions own(block);
    panels = own.add(int64_t{kTogether} * kPixels * block);
    statistics = own.add(int64_t{blocks} * block * 2 * in_double);
    per_thread = own.size();
  }

  int blocks, threads;
  int64_t rows, panels, statistics, per_thread;
};

template <class T>
class Moments {
  using A = accumulate_t<T>;

 public:
  Moments(const MomentsArgs& args, const MomentsPlan& plan)
      : args_(args), plan_(plan), kernels_(kernels_for<T>(isa_in_use())), own_(static_cast<A*>(args.workspace)) {}

  // A thread's run of the rows of all images.
  void sum(int thread, int threads) const {
    std::memset(means(thread), 0, int64_t{plan_.blocks} * block_ * 2 * sizeof(double));
    int64_t count = 0;
    for (int64_t i = first(thread, threads); i < first(thread + 1, threads); ++i) {
      for (int col = 0; col < args_.W; col += kPixels) {
        const int pixels = std::min(kPixels, args_.W - col);
        tile(i / args_.H, static_cast<int>(i % args_.H), col, pixels, thread, count);
        count += pixels;
      }
    }
  }

  // A thread's share of the channels, of all threads' statistics.
  void merge(int thread, int threads) const {
    for (int64_t c = int64_t{args_.C} * thread / threads; c < int64_t{args_.C} * (thread + 1) / threads; ++c) {
      Statistics all;
      for (int t = 0; t < threads; ++t) {
        const int64_t n = (first(t + 1, threads) - first(t, threads)) * args_.W;
        all.add(means(t)[c], means(t)[plan_.blocks * block_ + c], static_cast<double>(n));
      }
      static_cast<A*>(args_.mean)[c] = static_cast<A>(all.mean);
      static_cast<A*>(args_.m2)[c] = static_cast<A>(all.m2);
    }
  }

 private:
  static constexpr int block_ = kBlock<A>;

  int64_t first(int thread, int threads) const { return plan_.rows * thread / threads; }
  A* memory(int thread) const { return own_ + thread * plan_.per_thread; }
  double* means(int thread) const { return reinterpret_cast<double*>(memory(thread) + plan_.statistics); }

  void tile(int64_t image, int row, int col, int pixels, int thread, int64_t count) const {
    const TensorRef& x = args_.x;
    const int64_t panel = int64_t{pixels} * block_;
    const int together = args_.nhwc ? kTogether : 1;
    A* const panels = memory(thread) + plan_.panels;
    for (int b = 0; b < plan_.blocks; b += together) {
      const int lanes = std::min(together * block_, args_.C - b * block_);
      const auto stage = args_.nhwc ? kernels_.stage_nhwc : kernels_.stage_nchw;
      stage({at<T>(x, image, int64_t{b} * block_, row, col),
             x.h,
             x.w,
             x.c,
             1,
             pixels,
             lanes,
             x.h,
             {},
             panels,
             block_,
             panel,
             false});
      for (int i = 0; i * block_ < lanes; ++i) {
        double* const mean = means(thread) + (b + i) * block_;
        const A infinity = std::numeric_limits<A>::infinity();
        kernels_.finish({panels + i * panel, pixels, nullptr, -infinity, infinity, mean, mean + plan_.blocks * block_,
                         static_cast<double>(count)});
      }
    }
  }

  const MomentsArgs& args_;
  const MomentsPlan& plan_;
  const Kernels<A>& kernels_;
  A* const own_;
};

template <class T>
void run(const MomentsArgs& args) {
  const MomentsPlan plan(args, kBlock<accumulate_t<T>>);
  const Moments<T> moments(args, plan);
  in_parallel(plan.threads, [&](int thread, int threads) {
    moments.sum(thread, threads);
    barrier();
    moments.merge(thread, threads);
  });
}

void check(const MomentsArgs& args) {
  const std::pair<const char*, int32_t> sizes[] = {{"C", args.C}, {"H", args.H}, {"W", args.W}};
  for (const auto& [name, size] : sizes) {
    if (size < 1) throw std::invalid_argument(std::string(name) + " must be at least 1; got " + std::to_string(size));
  }
  if (args.N < 0) throw std::invalid_argument("N must be at least 0; got " + std::to_string(args.N));
}

}  // namespace

int64_t workspace_bytes(const MomentsArgs& args) {
  check(args);
  const bool wide = args.dtype == Dtype::kFloat64;
  const MomentsPlan plan(args, wide ? kBlock<double> : kBlock<float>);
  return plan.threads * plan.per_thread * (wide ? 8 : 4);
}

void moments(const MomentsArgs& args) {
  check(args);
  with_dtype(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    run<T>(args);
  });
}

}  // namespace xsep::cpu

// The end of a residual module on the CPU, forward and backward, a row at a time.
//
// Bytes: forward reads y and skip and writes out, once each.  Backward reads dout, y and skip (where it has vectors)
// and writes dy and dskip, once each: which pixel of a window was the largest is found again, not kept.
//
// A thread takes a contiguous run of the rows, so that sums depend on the number of threads and on nothing else.

#include "../residual_sum.h"

#include <algorithm>
#include <cstring>

#include "call.h"
#include "isa.h"
#include "parallel.h"

namespace xsep::cpu {
namespace {

constexpr int64_t kElementsPerThread = 4 * 1024;  // fewer are not worth a thread

bool pools(const ConvShape& s) { return s.R > 1 || s.S > 1 || s.stride_h > 1 || s.stride_w > 1; }

// Sizes in elements of the accumulation type.  A thread's memory: its sums, those of a row, and the choices of as many
// rows of windows as a row of y lies in.
struct ResidualPlan {
  explicit ResidualPlan(const ResidualSumArgs& args) {
    const ConvShape& s = args.shape;
    rows = int64_t{s.N} * (args.backward ? s.H : s.P());
    threads = static_cast<int>(std::clamp<int64_t>(s.x_numel() / kElementsPerThread, 1, args.threads));
    if (!args.backward) return;
    sums = int64_t{3} * s.C;
    choice_rows = pools(s) ? (s.R - 1) / s.stride_h + 1 : 0;
    per_thread = (2 * sums + choice_rows * int64_t{s.Q()} * s.C + 15) / 16 * 16;
  }

  int64_t rows;
  int threads;
  int64_t sums = 0, per_thread = 0;
  int choice_rows = 0;
};

template <class T>
class ResidualSum {
  using A = accumulate_t<T>;

 public:
  ResidualSum(const ResidualSumArgs& args, const ResidualPlan& plan)
      : args_(args),
        plan_(plan),
        s_(args.shape),
        kernels_(kernels_for<T>(isa_in_use())),
        out_(dense<T>(args.out, true, s_.C, s_.P(), s_.Q())),
        dy_(dense<T>(args.dy, true, s_.C, s_.H, s_.W)),
        dskip_(dense<T>(args.dskip, true, s_.C, s_.P(), s_.Q())) {}

  void forward(int64_t i) const {
    const int64_t image = i / s_.P();
    const int p = static_cast<int>(i % s_.P());
    kernels_.residual_row(row(image, p));
  }

  // Rows of y, or of dy, of all images.
  void backward(int64_t begin, int64_t end, A* own) const {
    std::memset(own, 0, plan_.sums * sizeof(A));
    for (int64_t i = begin; i < end;) {
      const int first = static_cast<int>(i % s_.H);
      const int last = static_cast<int>(std::min<int64_t>(s_.H, first + end - i));
      backward(i / s_.H, {first, last}, own);
      i += last - first;
    }
  }

  // A thread's share of the sums of all threads; `own` is the first thread's memory.
  void reduce(int thread, int threads, const A* own) const {
    A* const results[] = {static_cast<A*>(args_.dshift), static_cast<A*>(args_.dscale),
                          static_cast<A*>(args_.dskip_scale)};
    for (int i = 0; i < (args_.skip_scale ? 3 : 2); ++i) {
      for (int64_t c = int64_t{s_.C} * thread / threads; c < int64_t{s_.C} * (thread + 1) / threads; ++c) {
        A total = own[i * s_.C + c];
        for (int t = 1; t < threads; ++t) total += own[t * plan_.per_thread + i * s_.C + c];
        results[i][c] = total;
      }
    }
  }

 private:
  static const A* vector(const void* p) { return static_cast<const A*>(p); }
  static T* to(const TensorRef& t, int64_t image, int row) {
    return t.data ? const_cast<T*>(at<T>(t, image, 0, row, 0)) : nullptr;
  }

  ResidualRow<A> row(int64_t image, int p) const {
    return {{at<T>(args_.y, image, 0, 0, 0), args_.y.h, args_.y.w, s_.H, s_.W, p * s_.stride_h - s_.pad_top,
             -s_.pad_left, s_.stride_h, s_.stride_w, 1, 1},
            s_.R,
            s_.S,
            s_.Q(),
            s_.C,
            args_.relu,
            vector(args_.center),
            vector(args_.scale),
            vector(args_.shift),
            to(args_.skip, image, p),
            args_.skip.w,
            vector(args_.skip_center),
            vector(args_.skip_scale),
            vector(args_.skip_shift),
            to(out_, image, p),
            out_.w};
  }

  // The sums of a row of windows belong to whom its first row of y belongs to.
  void backward(int64_t image, Span rows, A* own) const {
    const Axis axis{s_.H, s_.P(), s_.R, s_.stride_h, s_.pad_top, 1};
    const bool pooled = plan_.choice_rows > 0;
    int next = std::max(0, axis.reads_dy(rows).lo);
    for (int h = rows.lo; h < rows.hi; ++h) {
      for (const int end = std::min(s_.P(), (h + s_.pad_top) / s_.stride_h + 1); next < end; ++next) {
        const bool counted = std::max(0, next * s_.stride_h - s_.pad_top) >= rows.lo;
        A* const choice = pooled ? choices(own) + next % plan_.choice_rows * choice_row() : nullptr;
        kernels_.residual_row_grad({row(image, next), at<T>(args_.dout, image, 0, next, 0), args_.dout.w, choice,
                                    pooled ? nullptr : to(dy_, image, next), to(dskip_, image, next),
                                    counted ? own : nullptr, own + s_.C, own + 2 * s_.C, own + plan_.sums});
      }
      if (!pooled) continue;
      kernels_.unpool_row({at<T>(args_.dout, image, 0, 0, 0), args_.dout.h, args_.dout.w, choices(own),
                           plan_.choice_rows, h, s_.W, s_.C, s_.P(), s_.Q(), s_.R, s_.S, s_.stride_h, s_.stride_w,
                           s_.pad_top, s_.pad_left, vector(args_.scale), to(dy_, image, h)});
    }
  }
  int64_t choice_row() const { return int64_t{s_.Q()} * s_.C; }
  A* choices(A* own) const { return own + 2 * plan_.sums; }

  const ResidualSumArgs& args_;
  const ResidualPlan& plan_;
  const ConvShape& s_;
  const Kernels<A>& kernels_;
  const TensorRef out_, dy_, dskip_;
};

template <class T>
void run(const ResidualSumArgs& args, const ResidualPlan& plan) {
  using A = accumulate_t<T>;
  const ResidualSum<T> sum(args, plan);
  A* const first = static_cast<A*>(args.workspace);
  in_parallel(plan.threads, [&](int thread, int threads) {
    const int64_t begin = plan.rows * thread / threads, end = plan.rows * (thread + 1) / threads;
    if (args.backward) {
      sum.backward(begin, end, first + thread * plan.per_thread);
      barrier();
      sum.reduce(thread, threads, first);
    } else {
      for (int64_t i = begin; i < end; ++i) sum.forward(i);
    }
  });
}

void check(const ResidualSumArgs& args) {
  const ConvShape& s = args.shape;
  check(s);
  const auto require = [](bool fits, const std::string& rule) {
    if (!fits) throw std::invalid_argument("a max-pool's " + rule);
  };
  if (args.relu && args.skip.data) throw std::invalid_argument("a residual sum with skip has no relu");
  require(s.M == 1 && s.dilation_h == 1 && s.dilation_w == 1, "multiplier and dilations must be 1");
  require(std::max(s.pad_top, s.pad_bottom) < s.R && std::max(s.pad_left, s.pad_right) < s.S,
          "pads must be smaller than its window");
}

}  // namespace

int64_t workspace_bytes(const ResidualSumArgs& args) {
  check(args);
  const ResidualPlan plan(args);
  return plan.threads * plan.per_thread * (args.dtype == Dtype::kFloat64 ? 8 : 4);
}

void residual_sum(const ResidualSumArgs& args) {
  check(args);
  const ResidualPlan plan(args);
  with_dtype(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    run<T>(args, plan);
  });
}

}  // namespace xsep::cpu

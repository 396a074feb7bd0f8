// The training block on the CPU: a tile of pixels whose depthwise result lives in the second-level cache goes through
// the matrix product at once.
//
// Forward, a tile: x is staged (function on load applied) for some blocks of channels, convolved into z, and z is
// multiplied by the weights, two panels of kBlock output channels at a time; each panel gets its epilogue and its
// statistics while it is in the first-level cache, and is stored.  Bytes: x once, plus the halo between tiles from a
// cache; y once; the weights once a tile, from whatever cache holds them.
//
// Backward, a strip of rows: the gradient of y is put together in panels; times the weights it gives dz, which stays
// with the last rows of the strip above; for some blocks of channels x is staged again and convolved into z, dz goes
// into the gradients of the filter and of x; then z and the gradient of y give the gradient of the weights.  Bytes: x,
// dy and y once, dx once; a thread's sums for the gradient of the weights are read and written once a strip.
//
// Results depend on the number of threads and on nothing else: items are dealt out in contiguous runs, and what threads
// have summed is added in their order.

#include "../separable.h"

#include <algorithm>
#include <cstring>

#if defined(_OPENMP)
#include <omp.h>
#endif

#include "call.h"
#include "isa.h"
#include "separable_plan.h"

namespace xsep::cpu {
namespace {

constexpr Span whole(int extent) { return {0, extent}; }

template <class T>
class Separable {
  using A = accumulate_t<T>;

 public:
  Separable(const SeparableArgs& args, const SeparablePlan& plan)
      : args_(args),
        plan_(plan),
        s_(args.shape),
        kernels_(kernels_for<T>(isa_in_use())),
        shared_(static_cast<A*>(args.workspace)),
        fprop_{plan.fprop_args,
               s_,
               plan.fprop,
               kernels_,
               shared_ + plan.fprop_w,
               shared_ + plan.fprop_bias,
               shared_ + plan.fprop_affine},
        grad_{plan.grad_args,
              s_,
              plan.grad,
              kernels_,
              shared_ + plan.grad_w,
              shared_ + plan.grad_bias,
              shared_ + plan.grad_affine},
        P_(s_.P()),
        Q_(s_.Q()),
        z_pixel_(plan.channels),
        stage_(args.nhwc ? kernels_.stage_nhwc : kernels_.stage_nchw),
        store_(args.nhwc ? kernels_.store_nhwc : kernels_.store_nchw) {}

  // A thread's share of what the tiles share.
  void prepare(int thread, int threads) const {
    for (int b = share(plan_.blocks, thread, threads); b < share(plan_.blocks, thread + 1, threads); ++b) {
      pack(fprop_, b);
      if (!args_.backward) continue;
      pack(grad_, b);
      // [K][kBlock]: channels of x are neighbours.
      kernels_.stage_nhwc({w_pw() + b * block_,
                           s_.C,
                           s_.C,
                           1,
                           1,
                           args_.K,
                           lanes(b, s_.C),
                           0,
                           {},
                           shared_ + plan_.w_pw + int64_t{b} * args_.K * block_,
                           block_});
    }
    for (int b = share(plan_.k_blocks, thread, threads); b < share(plan_.k_blocks, thread + 1, threads); ++b) {
      if (args_.backward) {
        pack_statistics(b);
        continue;
      }
      // [C][kBlock]: channels of y are neighbours.
      kernels_.stage_nchw({w_pw() + int64_t{b} * block_ * s_.C,
                           s_.C,
                           1,
                           s_.C,
                           1,
                           s_.C,
                           lanes(b, args_.K),
                           int64_t{block_} * s_.C,
                           {},
                           shared_ + plan_.w_pw + int64_t{b} * s_.C * block_,
                           block_});
      for (int lane = 0; lane < block_; ++lane) {
        const int k = b * block_ + lane;
        const T* bias = static_cast<const T*>(args_.bias);
        shared_[plan_.bias + k] = bias && k < args_.K ? to_float(bias[k]) : A{0};
      }
    }
  }

  // The sums of backward start from nothing.
  void reset(A* own) const {
    std::memset(own + plan_.sums, 0, plan_.grad.sums * sizeof(A));
    std::memset(own + plan_.dw_pw, 0, int64_t{plan_.k_blocks} * block_ * s_.C * sizeof(A));
  }

  // The tiles of y of a group, and their statistics.  Returns the number of their pixels.
  int64_t forward_group(int group, A* own) const {
    if (args_.statistics) std::memset(statistics(group), 0, int64_t{plan_.k_blocks} * block_ * 2 * sizeof(double));
    int64_t count = 0;
    for (int64_t i = plan_.items * group / plan_.groups; i < plan_.items * (group + 1) / plan_.groups; ++i) {
      forward(i, own, statistics(group), count);
    }
    return count;
  }

  // Part i of the rows of an image.
  void backward(int64_t i, A* own) const {
    const int part = static_cast<int>(i % plan_.rows.tiles);
    const int64_t image = i / plan_.rows.tiles;
    A* const dz = own + plan_.dz_tile;
    const int64_t dz_row = Q_ * z_pixel_;
    int first = 0;  // row that dz begins with
    for (const Strip& strip : plan_.strips(part)) {
      if (strip.kept > first) {
        std::memmove(dz, dz + (strip.kept - first) * dz_row, (strip.dz.lo - strip.kept) * dz_row * sizeof(A));
      }
      first = strip.kept;
      const int pixels = strip.dz.size() * Q_;
      A *const panels = own + plan_.panels, *const z = own + plan_.z_tile;
      for (int b = 0; b < plan_.k_blocks; ++b) {
        gradient_of_y(image, strip.dz, b, panels + int64_t{b} * pixels * block_, own + plan_.extra);
      }
      kernels_.gemm({panels, block_, int64_t{pixels} * block_, 1, shared_ + plan_.w_pw, int64_t{args_.K} * block_,
                     dz + (strip.dz.lo - first) * dz_row, z_pixel_, block_, pixels, args_.K, plan_.blocks, false});
      for (int b = 0; b < plan_.blocks; b += plan_.depth) {
        depthwise_backward(image, part, strip, b, std::min(plan_.depth, plan_.blocks - b), own);
      }
      // Rows of another part are not counted twice.
      const Span counted = intersection(strip.dz, plan_.rows.y(part));
      if (counted.size() <= 0) continue;
      const int64_t before = int64_t{counted.lo - strip.dz.lo} * Q_;
      kernels_.gemm({z + before * z_pixel_, 1, block_ * z_pixel_, z_pixel_, panels + before * block_,
                     int64_t{pixels} * block_, own + plan_.dw_pw, block_, int64_t{s_.C} * block_, s_.C,
                     counted.size() * Q_, plan_.k_blocks, true});
    }
  }

  // A thread's share of the results that all threads have summed; `own` is the first thread's memory.
  void reduce_sums(int thread, int threads, A* own) const {
    for (int b = share(plan_.blocks, thread, threads); b < share(plan_.blocks, thread + 1, threads); ++b) {
      reduce(grad_, b, own + plan_.sums, plan_.per_thread, threads);
    }
    for (int b = share(plan_.k_blocks, thread, threads); b < share(plan_.k_blocks, thread + 1, threads); ++b) {
      const int64_t size = int64_t{s_.C} * block_;
      A* const total = own + plan_.dw_pw + b * size;
      for (int t = 1; t < threads; ++t) kernels_.add(total + t * plan_.per_thread, total, size);
      kernels_.store_nchw({total,
                           block_,
                           static_cast<T*>(args_.dw_pw) + int64_t{b} * block_ * s_.C,
                           s_.C,
                           1,
                           s_.C,
                           1,
                           s_.C,
                           lanes(b, args_.K),
                           {},
                           nullptr});
    }
  }

  // A thread's share of the statistics of all groups, which are of counts[g] pixels each.
  void merge_statistics(int thread, int threads, const int64_t* counts) const {
    for (int64_t k = share(args_.K, thread, threads); k < share(args_.K, thread + 1, threads); ++k) {
      double mean = 0, m2 = 0, count = 0;
      for (int g = 0; g < plan_.groups; ++g) {
        const double* theirs = statistics(g);
        const double n = static_cast<double>(counts[g]), delta = theirs[k] - mean;
        mean += delta * (n / (count + n));
        m2 += theirs[plan_.k_blocks * block_ + k] + delta * delta * (count / (count + n) * n);
        count += n;
      }
      static_cast<A*>(args_.mean)[k] = static_cast<A>(mean);
      static_cast<A*>(args_.m2)[k] = static_cast<A>(m2);
    }
  }

  static int share(int64_t count, int thread, int threads) { return static_cast<int>(count * thread / threads); }

 private:
  static constexpr int block_ = kBlock<A>;

  static int lanes(int b, int channels) { return std::min(block_, channels - b * block_); }
  static Span intersection(Span a, Span b) { return {std::max(a.lo, b.lo), std::min(a.hi, b.hi)}; }
  const T* w_pw() const { return static_cast<const T*>(args_.w_pw); }

  // Of a group: the mean of each channel, then its m2.
  double* statistics(int group) const {
    return reinterpret_cast<double*>(shared_ + plan_.statistics) + int64_t{group} * plan_.k_blocks * block_ * 2;
  }

  // Tile i of y.  `count` is the number of pixels that `statistics` are of.
  void forward(int64_t i, A* own, double* statistics, int64_t& count) const {
    const int row_tile = static_cast<int>(i % plan_.rows.tiles);
    const int col_tile = static_cast<int>(i / plan_.rows.tiles % plan_.cols.tiles);
    const int64_t image = i / plan_.rows.tiles / plan_.cols.tiles;
    const Span rows = plan_.rows.y(row_tile), cols = plan_.cols.y(col_tile);
    const int pixels = rows.size() * cols.size();
    A* const z = own + plan_.z_tile;
    for (int b = 0; b < plan_.blocks; b += plan_.depth) {
      const int n = std::min(plan_.depth, plan_.blocks - b);
      convolve(stage_x(image, rows, cols, b, n, own), rows.size(), cols.size(), b, n, z);
    }
    if (args_.between.any()) {
      kernels_.clamp(z, pixels * z_pixel_, static_cast<A>(args_.between.low), static_cast<A>(args_.between.high));
    }
    A* const panels = own + plan_.panels;
    for (int k = 0; k < plan_.k_blocks; k += kPanels) {
      const int n = std::min(kPanels, plan_.k_blocks - k);
      const int64_t panel = int64_t{pixels} * block_;
      kernels_.gemm({z, z_pixel_, block_, 1, shared_ + plan_.w_pw + int64_t{k} * s_.C * block_, int64_t{s_.C} * block_,
                     panels, block_, panel, pixels, s_.C, n, false});
      for (int b = k; b < k + n; ++b) finish(image, rows, cols, b, panels + (b - k) * panel, own, statistics, count);
    }
    count += pixels;
  }

  // n blocks from b on of `rows` x `cols` of a tensor.
  void stage(const TensorRef& t, int channels, int64_t image, Span rows, Span cols, int b, int n,
             const Affine<A>& affine, A* tile, int64_t tile_pixel) const {
    const int together = t.c == 1 && args_.nhwc ? n : 1;
    for (int i = 0; i < n; i += together) {
      const int first = (b + i) * block_;
      Affine<A> own = affine;
      if (affine.any) own.center += i * block_, own.scale += i * block_, own.shift += i * block_;
      stage_({at<T>(t, image, first, rows.lo, cols.lo), t.h, t.w, t.c, rows.size(), cols.size(),
              std::min(together * block_, channels - first), rows.size() * t.h, own, tile + i * block_, tile_pixel});
    }
  }

  // u where `rows` x `cols` of z read it, n blocks from b on.
  Pixels stage_x(int64_t image, Span rows, Span cols, int b, int n, A* own) const {
    const Span x_rows = plan_.rows.axis.reads_x(rows), x_cols = plan_.cols.axis.reads_x(cols);
    const Span there = within(x_rows, s_.H), across = within(x_cols, s_.W);
    const int64_t pixel = int64_t{n} * block_;
    A* const tile = own + plan_.x_tile;
    stage(args_.x, s_.C, image, there, across, b, n, fprop_.affine(b), tile, pixel);
    return {tile,
            across.size() * pixel,
            pixel,
            there.size(),
            across.size(),
            x_rows.lo - there.lo,
            x_cols.lo - across.lo,
            s_.stride_h,
            s_.stride_w,
            s_.dilation_h,
            s_.dilation_w};
  }

  void convolve(const Pixels& u, int rows, int cols, int b, int n, A* z) const {
    const int64_t next = int64_t{plan_.fprop.taps} * block_;
    kernels_.conv_staged({u, s_.R, s_.S, fprop_.packed_w + b * next, next, fprop_.packed_bias + b * block_,
                          z + b * block_, cols * z_pixel_, z_pixel_, rows, cols, n, int64_t{n - 1} * block_, false});
  }

  void finish(int64_t image, Span rows, Span cols, int b, A* panel, A* own, double* statistics, int64_t count) const {
    const int pixels = rows.size() * cols.size();
    A *const residual = own + plan_.extra, *const mean = own + plan_.tile_statistics;
    A *const correction = mean + block_, *const m2 = correction + block_;
    if (args_.residual.data) stage(args_.residual, args_.K, image, rows, cols, b, 1, {}, residual, block_);
    kernels_.finish({panel, pixels, args_.bias ? shared_ + plan_.bias + b * block_ : nullptr,
                     args_.residual.data ? residual : nullptr, static_cast<A>(args_.after.low),
                     static_cast<A>(args_.after.high), args_.statistics ? mean : nullptr, correction, m2});
    const TensorRef y = dense<T>(args_.y, args_.nhwc, args_.K, P_, Q_);
    T* const dst = const_cast<T*>(at<T>(y, image, int64_t{b} * block_, rows.lo, cols.lo));
    store_({panel, block_, dst, y.h, y.w, y.c, rows.size(), cols.size(), lanes(b, args_.K), {}, nullptr});
    if (!args_.statistics) return;
    // Chan's merge of the tile's statistics with those of the `count` pixels before it.
    double* const means = statistics + b * block_;
    double* const m2s = means + plan_.k_blocks * block_;
    const double n = pixels, part = n / (count + n), weight = count * part;
    for (int lane = 0; lane < block_; ++lane) {
      const double delta = static_cast<double>(mean[lane]) + correction[lane] - means[lane];
      means[lane] += delta * part;
      m2s[lane] += m2[lane] + delta * delta * weight;
    }
  }

  // center, scale and shift that make mean's and m2's part in the gradient of y of y itself.
  void pack_statistics(int b) const {
    const double count = static_cast<double>(int64_t{s_.N} * P_ * Q_);
    const int64_t each = int64_t{plan_.k_blocks} * block_;
    for (int lane = 0; lane < block_; ++lane) {
      const int k = b * block_ + lane;
      const auto value = [&](const void* vector) {
        return args_.statistics && k < args_.K ? static_cast<const A*>(vector)[k] : A{0};
      };
      A* const to = shared_ + plan_.y_affine + k;
      to[0] = value(args_.mean_made);
      to[each] = 2 * value(args_.dm2);
      to[2 * each] = static_cast<A>(value(args_.dmean) / std::max(count, 1.0));
    }
  }

  // Block b of dy + dmean / count + 2 (y - mean) dm2, as a panel.
  void gradient_of_y(int64_t image, Span rows, int b, A* panel, A* extra) const {
    const bool with_dy = args_.dy.data != nullptr;
    if (with_dy) stage(args_.dy, args_.K, image, rows, whole(Q_), b, 1, {}, panel, block_);
    if (!args_.statistics) return;
    const A* vectors = shared_ + plan_.y_affine + b * block_;
    const int64_t each = int64_t{plan_.k_blocks} * block_;
    A* const to = with_dy ? extra : panel;
    stage(args_.y_made, args_.K, image, rows, whole(Q_), b, 1,
          {true, false, vectors, vectors + each, vectors + 2 * each}, to, block_);
    if (with_dy) kernels_.add(extra, panel, int64_t{rows.size()} * Q_ * block_);
  }

  // n blocks from b on: z of the strip, and from dz the gradients of the filter, of x and of the vectors.
  void depthwise_backward(int64_t image, int part, const Strip& strip, int b, int n, A* own) const {
    const Pixels u = stage_x(image, strip.dz, whole(Q_), b, n, own);
    A* const z = own + plan_.z_tile;
    convolve(u, strip.dz.size(), Q_, b, n, z);
    const int64_t dz_row = Q_ * z_pixel_, last = int64_t{n - 1} * block_;
    A* const kept = own + plan_.dz_tile + b * block_;  // from row strip.kept on
    if (args_.between.any()) {
      kernels_.relu_with_gradient(z + b * block_, kept + (strip.dz.lo - strip.kept) * dz_row, strip.dz.size() * Q_,
                                  z_pixel_, n * block_);
    }
    A* const sums = own + plan_.sums + b * plan_.grad.sums_per_block;
    const Span counted = intersection(strip.dz, plan_.rows.y(part));
    if (counted.size() > 0) {
      Pixels x = u;
      x.first_row += (counted.lo - strip.dz.lo) * s_.stride_h;
      kernels_.wgrad_staged({x, s_.R, s_.S, kept + (counted.lo - strip.kept) * dz_row, dz_row, z_pixel_, counted.size(),
                             Q_, n, last, sums, plan_.grad.sums_per_block, false});
    }
    if (strip.dx.size() == 0) return;
    const Pixels dz{kept, dz_row, z_pixel_, strip.dz.hi - strip.kept, Q_, 0, 0, 1, 1, 1, 1};
    A* const out = own + plan_.out_tile;
    for (int i = 0; i < std::min(s_.stride_h, strip.dx.size()); ++i) {
      for (int j = 0; j < std::min(s_.stride_w, s_.W); ++j) dgrad_class(dz, strip, b, n, i, j, out);
    }
    const TensorRef dx = dense<T>(args_.dx, args_.nhwc, s_.C, s_.H, s_.W);
    for (int c = b; c < b + n; ++c) {
      const Affine<A> affine = fprop_.affine(c);
      AffineGrad<A> grad{};
      if (affine.any) {
        A* const of_vectors = own + plan_.sums + c * plan_.grad.sums_per_block + int64_t{plan_.grad.taps} * block_;
        grad = {affine,
                at<T>(args_.x, image, int64_t{c} * block_, strip.dx.lo, 0),
                args_.x.h,
                args_.x.w,
                args_.x.c,
                of_vectors,
                of_vectors + block_};
      }
      T* const dst = const_cast<T*>(at<T>(dx, image, int64_t{c} * block_, strip.dx.lo, 0));
      store_({out + (c - b) * block_, int64_t{n} * block_, dst, dx.h, dx.w, dx.c, strip.dx.size(), s_.W, lanes(c, s_.C),
              grad, nullptr});
    }
  }

  // Positions of one residue modulo the stride are an ordinary convolution with the taps of that residue.
  void dgrad_class(Pixels dz, const Strip& strip, int b, int n, int i, int j, A* out) const {
    const Plan& plan = plan_.grad;
    const int h = strip.dx.lo + i + s_.pad_top, w = j + s_.pad_left;
    const int row_class = h % s_.stride_h, col_class = w % s_.stride_w;
    const TapClass &rows = plan.row_classes[row_class], &cols = plan.col_classes[col_class];
    dz.first_row = h / s_.stride_h + rows.first - strip.kept, dz.first_col = w / s_.stride_w + cols.first;
    dz.tap_row = rows.step, dz.tap_col = cols.step;
    const int tap_rows = static_cast<int>(rows.taps.size()), tap_cols = static_cast<int>(cols.taps.size());
    const int64_t next = int64_t{plan.taps} * block_, pixel = int64_t{n} * block_, row = s_.W * pixel;
    const A* weights =
        grad_.packed_w + b * next + int64_t{plan.class_start[row_class * s_.stride_w + col_class]} * block_;
    kernels_.conv_staged({dz, tap_cols ? tap_rows : 0, tap_cols, weights, next, grad_.packed_bias + b * block_,
                          out + i * row + j * pixel, s_.stride_h * row, s_.stride_w * pixel,
                          (strip.dx.size() - i + s_.stride_h - 1) / s_.stride_h,
                          (s_.W - j + s_.stride_w - 1) / s_.stride_w, n, int64_t{n - 1} * block_, false});
  }

  const SeparableArgs& args_;
  const SeparablePlan& plan_;
  const ConvShape& s_;
  const Kernels<A>& kernels_;
  A* const shared_;
  const Call<T> fprop_, grad_;
  const int P_, Q_;
  const int64_t z_pixel_;
  void (*const stage_)(const Stage<A>&);
  void (*const store_)(const Store<A>&);
};

template <class T>
void run(const SeparableArgs& args, const SeparablePlan& plan) {
  using A = accumulate_t<T>;
  const Separable<T> block(args, plan);
  A* const first = static_cast<A*>(args.workspace) + plan.shared;
  std::vector<int64_t> counts(plan.groups);

#if defined(_OPENMP)
#pragma omp parallel num_threads(plan.threads)
#endif
  {
#if defined(_OPENMP)
    const int threads = omp_get_num_threads(), thread = omp_get_thread_num();
#else
    const int threads = 1, thread = 0;
#endif
    const auto barrier = [] {
#if defined(_OPENMP)
#pragma omp barrier
#endif
    };
    A* const own = first + thread * plan.per_thread;
    block.prepare(thread, threads);
    if (args.backward) {
      // Sums of the same pixels at every call: what is dealt out as threads become free would differ in rounding.
      block.reset(own);
      barrier();
      for (int64_t i = plan.items * thread / threads; i < plan.items * (thread + 1) / threads; ++i) {
        block.backward(i, own);
      }
      barrier();
      block.reduce_sums(thread, threads, first);
    } else {
      barrier();
#if defined(_OPENMP)
#pragma omp for schedule(dynamic)
#endif
      for (int group = 0; group < plan.groups; ++group) counts[group] = block.forward_group(group, own);
      if (args.statistics) block.merge_statistics(thread, threads, counts.data());
    }
  }
}

void check(const SeparableArgs& args) {
  check(args.shape);
  if (args.shape.M != 1) throw std::invalid_argument("M must be 1; got " + std::to_string(args.shape.M));
  if (args.K < 1) throw std::invalid_argument("K must be at least 1; got " + std::to_string(args.K));
}

}  // namespace

int64_t workspace_bytes(const SeparableArgs& args) {
  check(args);
  return SeparablePlan(args).workspace_elements() * (args.dtype == Dtype::kFloat64 ? 8 : 4);
}

void separable(const SeparableArgs& args) {
  check(args);
  const SeparablePlan plan(args);
  with_dtype(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    run<T>(args, plan);
  });
}

}  // namespace xsep::cpu

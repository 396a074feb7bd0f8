// The training block on the CPU: a tile of pixels whose depthwise result lives in the second-level cache goes through
// the matrix product at once.
//
// All tiles lie in panels: the pixels of a block of kBlock channels follow each other, a cache line each.  Tensors are
// read and written for some blocks together, so that memory is walked in order.
//
// Forward, a tile: x is staged (function on load applied) and convolved into z, and z is multiplied by the weights, for
// some panels of output channels at a time; these get their epilogue and their statistics, and are stored.  Bytes: x
// once, plus the halo between tiles from a cache; y once; the weights once a tile, from whatever cache holds them.
//
// Backward, a strip of rows: the gradient of y is put together; times the weights it gives dz, which stays with the
// last rows of the strip above; for some blocks of channels x is staged again and convolved into z, dz goes into the
// gradients of the filter and of x; then z and the gradient of y give the gradient of the weights.  Bytes: x, dy and y
// once, dx once; a thread's sums for the gradient of the weights are read and written once a strip.
//
// A filter of one pixel with a stride reads some pixels of x, which then take the place of x; the other pixels of dx
// are zeros.
//
// Results depend on the number of threads, and the statistics, in rounding, on the second-level cache: items are dealt
// out in contiguous runs, and what threads have summed is added in their order.

#include "../separable.h"

#include <algorithm>
#include <cstring>
#include <tuple>

#include "call.h"
#include "isa.h"
#include "parallel.h"
#include "separable_plan.h"
#include "statistics.h"

namespace xsep::cpu {
namespace {

constexpr Span whole(int extent) { return {0, extent}; }

// Extents of x, of which every step-th row and column takes part.
struct Grid {
  int H, W, step_h = 1, step_w = 1;

  bool sparse() const { return step_h > 1 || step_w > 1; }
};

// Makes a call with a filter of one pixel one without a stride, of the pixels of x that it reads.  Not NCHW, whose
// pixels have to be neighbours.
Grid remove_stride(SeparableArgs& args) {
  ConvShape& s = args.shape;
  const bool padded = s.pad_top || s.pad_bottom || s.pad_left || s.pad_right;
  if (!args.nhwc || s.R > 1 || s.S > 1 || padded) return {s.H, s.W};
  const Grid grid{s.H, s.W, s.stride_h, s.stride_w};
  args.x.h *= s.stride_h, args.x.w *= s.stride_w;
  std::tie(s.H, s.W) = std::make_tuple(s.P(), s.Q());
  s.stride_h = s.stride_w = 1;
  return grid;
}

template <class T>
class Separable {
  using A = accumulate_t<T>;

 public:
  Separable(const SeparableArgs& args, const Grid& grid, const SeparablePlan& plan)
      : args_(args),
        grid_(grid),
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
        stage_(args.nhwc ? kernels_.stage_nhwc : kernels_.stage_nchw),
        store_(args.nhwc ? kernels_.store_nhwc : kernels_.store_nchw),
        dx_(dense<T>(args.dx, args.nhwc, s_.C, grid.H, grid.W)) {}

  // A thread's share of what the tiles share.
  void prepare(int thread, int threads) const {
    const int begin = share(plan_.blocks, thread, threads), end = share(plan_.blocks, thread + 1, threads);
    for (int b = begin; b < end; ++b) {
      pack(fprop_, b);
      if (args_.backward) pack(grad_, b);
    }
    // [K][kBlock]: channels of x are neighbours.
    for (int b = begin; args_.backward && b < end; b += kTogether) {
      const int64_t panel = int64_t{args_.K} * block_;
      const int channels = std::min(std::min(kTogether, end - b) * block_, s_.C - b * block_);
      kernels_.stage_nhwc({w_pw() + b * block_,
                           s_.C,
                           s_.C,
                           1,
                           1,
                           args_.K,
                           channels,
                           0,
                           {},
                           shared_ + plan_.w_pw + b * panel,
                           block_,
                           panel,
                           false});
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
                           block_,
                           block_,
                           false});
      for (int lane = 0; lane < block_; ++lane) {
        const int k = b * block_ + lane;
        const T* bias = static_cast<const T*>(args_.bias);
        shared_[plan_.bias + k] = bias && k < args_.K ? to_float(bias[k]) : A{0};
      }
    }
  }

  // A thread's run of parts.  Its sums start from nothing.
  void backward(int64_t begin, int64_t end, A* own) const {
    std::memset(own + plan_.sums, 0, plan_.grad.sums * sizeof(A));
    bool add = false;  // to dw_pw
    for (int64_t i = begin; i < end; ++i) backward(i, add, own);
    if (!add) std::memset(own + plan_.dw_pw, 0, int64_t{plan_.k_blocks} * block_ * s_.C * sizeof(A));
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
  void backward(int64_t i, bool& add, A* own) const {
    const int part = static_cast<int>(i % plan_.rows.tiles);
    const int64_t image = i / plan_.rows.tiles;
    A *const dz = own + plan_.dz_tile, *panels = own + plan_.panels, *z = own + plan_.z_tile;
    int first = 0;  // row that dz begins with
    for (const Strip& strip : plan_.strips(part)) {
      if (strip.kept > first) {
        for (int b = 0; b < plan_.blocks; ++b) {
          A* const panel = dz + b * dz_panel();
          std::memmove(panel, panel + (strip.kept - first) * row(), (strip.dz.lo - strip.kept) * row() * sizeof(A));
        }
      }
      first = strip.kept;
      const int pixels = strip.dz.size() * Q_;
      const int64_t panel = strip.dz.size() * row();
      gradient_of_y(image, strip.dz, panels);
      kernels_.gemm({panels, panel, false, shared_ + plan_.w_pw, int64_t{args_.K} * block_,
                     dz + (strip.dz.lo - first) * row(), dz_panel(), pixels, args_.K, plan_.blocks, false});
      for (int b = 0; b < plan_.blocks; b += plan_.depth) {
        depthwise_backward(image, part, strip, b, std::min(plan_.depth, plan_.blocks - b), z, own);
      }
      // Rows of another part are not counted twice.
      const Span counted = intersection(strip.dz, plan_.rows.y(part));
      if (counted.size() <= 0) continue;
      const int64_t before = (counted.lo - strip.dz.lo) * row();
      kernels_.gemm({z + before, panel, true, panels + before, panel, own + plan_.dw_pw, int64_t{s_.C} * block_, s_.C,
                     counted.size() * Q_, plan_.k_blocks, add});
      add = true;
      std::swap(panels, z);  // z was read last, often: what is written there finds its lines in the cache
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
      Statistics all;
      for (int g = 0; g < plan_.groups; ++g) {
        all.add(statistics(g)[k], statistics(g)[plan_.k_blocks * block_ + k], static_cast<double>(counts[g]));
      }
      static_cast<A*>(args_.mean)[k] = static_cast<A>(all.mean);
      static_cast<A*>(args_.m2)[k] = static_cast<A>(all.m2);
    }
  }

  static int share(int64_t count, int thread, int threads) { return static_cast<int>(count * thread / threads); }

 private:
  static constexpr int block_ = kBlock<A>;

  static int lanes(int b, int channels) { return std::min(block_, channels - b * block_); }
  static Span intersection(Span a, Span b) { return {std::max(a.lo, b.lo), std::min(a.hi, b.hi)}; }
  // Elements of a panel: of a row of z, and of all rows of dz that are held.
  int64_t row() const { return int64_t{Q_} * block_; }
  int64_t dz_panel() const { return plan_.dz_rows * row(); }
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
    const int64_t panel = int64_t{pixels} * block_;
    A *const z = own + plan_.z_tile, *const panels = own + plan_.panels;
    for (int b = 0; b < plan_.blocks; b += plan_.depth) {
      const int n = std::min(plan_.depth, plan_.blocks - b);
      Pixels u = stage_x(image, rows, cols, b, n, own);
      for (int c = b; c < b + n; ++c, next_panel(u)) convolve(u, rows.size(), cols.size(), c, z + c * panel);
    }
    if (args_.between.any()) {
      kernels_.clamp(z, plan_.blocks * panel, static_cast<A>(args_.between.low), static_cast<A>(args_.between.high));
    }
    for (int k = 0; k < plan_.k_blocks; k += kTogether) {
      const int n = std::min(kTogether, plan_.k_blocks - k);
      kernels_.gemm({z, panel, false, shared_ + plan_.w_pw + int64_t{k} * s_.C * block_, int64_t{s_.C} * block_, panels,
                     panel, pixels, s_.C, n, false});
      finish(image, rows, cols, k, n, panels, statistics, count);
    }
    count += pixels;
  }

  // n blocks from b on of `rows` x `cols` of a tensor, as panels.
  void stage(const TensorRef& t, int channels, int64_t image, Span rows, Span cols, int b, int n, Affine<A> affine,
             A* panels, bool add) const {
    const int together = t.c == 1 && args_.nhwc ? n : 1;
    const int64_t panel = int64_t{rows.size()} * cols.size() * block_;
    for (int i = 0; i < n; i += together, panels += panel) {
      const int first = (b + i) * block_;
      stage_({at<T>(t, image, first, rows.lo, cols.lo), t.h, t.w, t.c, rows.size(), cols.size(),
              std::min(together * block_, channels - first), rows.size() * t.h, affine, panels, block_, panel, add});
      if (affine.any) affine.center += block_, affine.scale += block_, affine.shift += block_;
    }
  }

  // Back, with gradients of the vectors that belong to b's blocks.
  void store(const A* panels, const TensorRef& t, int channels, int64_t image, Span rows, Span cols, int b, int n,
             AffineGrad<A> grad) const {
    const int together = args_.nhwc ? n : 1;
    const int64_t panel = int64_t{rows.size()} * cols.size() * block_;
    for (int i = 0; i < n; i += together, panels += panel) {
      const int first = (b + i) * block_;
      T* const dst = const_cast<T*>(at<T>(t, image, first, rows.lo, cols.lo));
      store_({panels, block_, panel, dst, t.h, t.w, t.c, rows.size(), cols.size(),
              std::min(together * block_, channels - first), grad, nullptr});
      if (!grad.affine.any) continue;
      grad.affine.center += block_, grad.affine.scale += block_, grad.affine.shift += block_;
      grad.x = static_cast<const T*>(grad.x) + block_ * grad.x_lane;
      grad.dscale += grad.step, grad.dshift += grad.step;
    }
  }

  // u where `rows` x `cols` of z read it, n blocks from b on: the first panel.
  Pixels stage_x(int64_t image, Span rows, Span cols, int b, int n, A* own) const {
    const Span x_rows = plan_.rows.axis.reads_x(rows), x_cols = plan_.cols.axis.reads_x(cols);
    const Span there = within(x_rows, s_.H), across = within(x_cols, s_.W);
    A* const tile = own + plan_.x_tile;
    stage(args_.x, s_.C, image, there, across, b, n, fprop_.affine(b), tile, false);
    return {tile,
            int64_t{across.size()} * block_,
            block_,
            there.size(),
            across.size(),
            x_rows.lo - there.lo,
            x_cols.lo - across.lo,
            s_.stride_h,
            s_.stride_w,
            s_.dilation_h,
            s_.dilation_w};
  }

  static void next_panel(Pixels& u) { u.data = static_cast<const A*>(u.data) + u.rows * u.row; }

  // Block b of z, a panel.
  void convolve(const Pixels& u, int rows, int cols, int b, A* panel) const {
    kernels_.conv_staged({u, s_.R, s_.S, fprop_.packed_w + int64_t{b} * plan_.fprop.taps * block_, 0,
                          fprop_.packed_bias + b * block_, panel, int64_t{cols} * block_, block_, rows, cols, 1, 0,
                          false, false});
  }

  // n panels of products from block k on become y, and their statistics join those of the `count` pixels before.
  void finish(int64_t image, Span rows, Span cols, int k, int n, A* panels, double* statistics, int64_t count) const {
    const int pixels = rows.size() * cols.size();
    if (args_.residual.data) stage(args_.residual, args_.K, image, rows, cols, k, n, {}, panels, true);
    for (int b = k; b < k + n; ++b) {
      double* const means = args_.statistics ? statistics + b * block_ : nullptr;
      kernels_.finish({panels + int64_t{b - k} * pixels * block_, pixels,
                       args_.bias ? shared_ + plan_.bias + b * block_ : nullptr, static_cast<A>(args_.after.low),
                       static_cast<A>(args_.after.high), means, means ? means + plan_.k_blocks * block_ : nullptr,
                       static_cast<double>(count)});
    }
    store(panels, dense<T>(args_.y, args_.nhwc, args_.K, P_, Q_), args_.K, image, rows, cols, k, n, {});
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

  // dy + dmean / count + 2 (y - mean) dm2
  void gradient_of_y(int64_t image, Span rows, A* panels) const {
    const bool with_dy = args_.dy.data != nullptr;
    const int n = plan_.k_blocks;
    if (with_dy) stage(args_.dy, args_.K, image, rows, whole(Q_), 0, n, {}, panels, false);
    if (!args_.statistics) return;
    const A* vectors = shared_ + plan_.y_affine;
    const int64_t each = int64_t{n} * block_;
    stage(args_.y_made, args_.K, image, rows, whole(Q_), 0, n,
          {true, false, vectors, vectors + each, vectors + 2 * each}, panels, with_dy);
  }

  // n blocks from b on: z of the strip, and from dz the gradients of the filter, of x and of the vectors.
  void depthwise_backward(int64_t image, int part, const Strip& strip, int b, int n, A* z_panels, A* own) const {
    const Span counted = intersection(strip.dz, plan_.rows.y(part));
    const int64_t dx_panel = int64_t{strip.dx.size()} * s_.W * block_;
    A *const dx_tile = own + plan_.out_tile, *const sums = own + plan_.sums;
    Pixels u = stage_x(image, strip.dz, whole(Q_), b, n, own);
    for (int c = b; c < b + n; ++c, next_panel(u)) {
      A* const z = z_panels + c * strip.dz.size() * row();
      A* const dz = own + plan_.dz_tile + c * dz_panel();  // from row strip.kept on
      convolve(u, strip.dz.size(), Q_, c, z);
      if (args_.between.any()) {
        kernels_.relu_with_gradient(z, dz + (strip.dz.lo - strip.kept) * row(), strip.dz.size() * row());
      }
      if (counted.size() > 0) {
        Pixels x = u;
        x.first_row += (counted.lo - strip.dz.lo) * s_.stride_h;
        kernels_.wgrad_staged({x, s_.R, s_.S, dz + (counted.lo - strip.kept) * row(), row(), block_, counted.size(), Q_,
                               1, 0, sums + c * plan_.grad.sums_per_block, 0, false, false});
      }
      if (strip.dx.size() == 0) continue;
      const Pixels all{dz, row(), block_, strip.dz.hi - strip.kept, Q_, 0, 0, 1, 1, 1, 1};
      for (int i = 0; i < std::min(s_.stride_h, strip.dx.size()); ++i) {
        for (int j = 0; j < std::min(s_.stride_w, s_.W); ++j) {
          dgrad_class(all, strip, c, i, j, dx_tile + (c - b) * dx_panel);
        }
      }
    }
    if (strip.dx.size() == 0) return;
    if (grid_.sparse() && b == 0) {
      const int first = strip.dx.lo * grid_.step_h, end = strip.dx.hi == s_.H ? grid_.H : strip.dx.hi * grid_.step_h;
      std::memset(const_cast<T*>(at<T>(dx_, image, 0, first, 0)), 0, (end - first) * dx_.h * sizeof(T));
    }
    const Affine<A> affine = fprop_.affine(b);
    AffineGrad<A> grad{};
    if (affine.any) {
      const TensorRef& x = args_.x;
      A* const of_vectors = sums + b * plan_.grad.sums_per_block + int64_t{plan_.grad.taps} * block_;
      grad = {affine,
              at<T>(x, image, int64_t{b} * block_, strip.dx.lo, 0),
              x.h,
              x.w,
              x.c,
              of_vectors,
              of_vectors + block_,
              plan_.grad.sums_per_block};
    }
    const TensorRef to{dx_.data, dx_.n, dx_.c, dx_.h * grid_.step_h, dx_.w * grid_.step_w};
    store(dx_tile, to, s_.C, image, strip.dx, whole(s_.W), b, n, grad);
  }

  // Positions of one residue modulo the stride are an ordinary convolution with the taps of that residue.
  void dgrad_class(Pixels dz, const Strip& strip, int b, int i, int j, A* out) const {
    const Plan& plan = plan_.grad;
    const int h = strip.dx.lo + i + s_.pad_top, w = j + s_.pad_left;
    const int row_class = h % s_.stride_h, col_class = w % s_.stride_w;
    const TapClass &rows = plan.row_classes[row_class], &cols = plan.col_classes[col_class];
    dz.first_row = h / s_.stride_h + rows.first - strip.kept, dz.first_col = w / s_.stride_w + cols.first;
    dz.tap_row = rows.step, dz.tap_col = cols.step;
    const int tap_rows = static_cast<int>(rows.taps.size()), tap_cols = static_cast<int>(cols.taps.size());
    const int64_t out_row = int64_t{s_.W} * block_;
    const A* weights =
        grad_.packed_w + (int64_t{b} * plan.taps + plan.class_start[row_class * s_.stride_w + col_class]) * block_;
    kernels_.conv_staged({dz, tap_cols ? tap_rows : 0, tap_cols, weights, 0, grad_.packed_bias + b * block_,
                          out + i * out_row + j * block_, s_.stride_h * out_row, int64_t{s_.stride_w} * block_,
                          (strip.dx.size() - i + s_.stride_h - 1) / s_.stride_h,
                          (s_.W - j + s_.stride_w - 1) / s_.stride_w, 1, 0, false, false});
  }

  const SeparableArgs& args_;
  const Grid& grid_;
  const SeparablePlan& plan_;
  const ConvShape& s_;
  const Kernels<A>& kernels_;
  A* const shared_;
  const Call<T> fprop_, grad_;
  const int P_, Q_;
  void (*const stage_)(const Stage<A>&);
  void (*const store_)(const Store<A>&);
  const TensorRef dx_;
};

template <class T>
void run(const SeparableArgs& args, const Grid& grid, const SeparablePlan& plan) {
  using A = accumulate_t<T>;
  const Separable<T> block(args, grid, plan);
  A* const first = static_cast<A*>(args.workspace) + plan.shared;
  std::vector<int64_t> counts(plan.groups);
  in_parallel(plan.threads, [&](int thread, int threads) {
    A* const own = first + thread * plan.per_thread;
    block.prepare(thread, threads);
    if (args.backward) {
      // Sums of the same pixels at every call: what is dealt out as threads become free would differ in rounding.
      barrier();
      block.backward(plan.items * thread / threads, plan.items * (thread + 1) / threads, own);
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
  });
}

void check(const SeparableArgs& args) {
  check(args.shape);
  if (args.shape.M != 1) throw std::invalid_argument("M must be 1; got " + std::to_string(args.shape.M));
  if (args.K < 1) throw std::invalid_argument("K must be at least 1; got " + std::to_string(args.K));
}

}  // namespace

int64_t workspace_bytes(const SeparableArgs& given) {
  SeparableArgs args = given;
  check(args);
  remove_stride(args);
  return SeparablePlan(args).workspace_elements() * (args.dtype == Dtype::kFloat64 ? 8 : 4);
}

void separable(const SeparableArgs& given) {
  SeparableArgs args = given;
  check(args);
  const Grid grid = remove_stride(args);
  const SeparablePlan plan(args);
  with_dtype(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    run<T>(args, grid, plan);
  });
}

}  // namespace xsep::cpu

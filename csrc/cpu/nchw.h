// NCHW: a tile is a band of rows of one plane; vectors run along the flattened rows of the staged band.
//
// The band lies in the cache with a common pitch, so output i reads element i + offset(tap) for every tap, across row
// ends: small planes (10x10, 7x7) fill whole vectors, and what is computed between the rows is not stored.  A strided
// convolution reads the residues of the input modulo the stride, staged apart; a strided dgrad makes the residues of
// its output, interleaved as they are stored.  Bytes: each plane once, the halo of a band from the first-level cache.
#pragma once

#include "call.h"

namespace xsep::cpu {

template <class T>
class NchwTile {
  using A = accumulate_t<T>;

 public:
  NchwTile(const Call<T>& call, Scratch<A>& scratch, const Item& item)
      : call_(call), s_(call.shape), plan_(call.plan), scratch_(scratch), image_(item.image), c_(item.block),
        affine_(call.affine(c_)), y_rows_(plan_.rows.y(item.row_tile)), y_cols_(plan_.cols.y(item.col_tile)) {
    if (plan_.reads_x) {
      x_rows_ = plan_.rows.staged_x(item.row_tile);
      x_cols_ = plan_.cols.staged_x(item.col_tile);
      pitch_ = (x_cols_.size() + s_.stride_w - 1) / s_.stride_w;
      plane_ = (x_rows_.size() + s_.stride_h - 1) / s_.stride_h * pitch_;
    }
    if (plan_.makes_dx) {
      dx_rows_ = plan_.rows.x(item.row_tile);
      dx_cols_ = plan_.cols.x(item.col_tile);
    }
  }

  void run() {
    if (plan_.reads_x) {
      stage(call_.args.x, c_, s_.H, s_.W, x_rows_, x_cols_, s_.stride_h, s_.stride_w, pitch_, plane_, affine_,
            scratch_.x);
      set_x_taps();
    }
    for (int m = 0; m < s_.M; ++m) {
      if (call_.args.pass == Pass::kFprop) fprop(m);
      if (plan_.makes_dw) wgrad(m);
    }
    if (plan_.makes_dx) dgrad();
  }

 private:
  void stage(const TensorRef& t, int64_t channel, int H, int W, Span rows, Span cols, int stride_h, int stride_w,
             ptrdiff_t pitch, ptrdiff_t plane, const Affine<A>& affine, A* tile) {
    const Window h(rows, H), w(cols, W);
    const T* src = at<T>(t, image_, channel, rows.lo + h.lo, cols.lo + w.lo);
    call_.kernels.stage_nchw({src, t.h, rows.size(), cols.size(), h.lo, h.hi, w.lo, w.hi, stride_h, stride_w, pitch,
                              plane, stride_h * stride_w * plane + kSlack, affine, tile});
  }

  void set_x_taps() {
    std::vector<ptrdiff_t>& taps = scratch_.taps;
    taps.clear();
    for (int r = 0; r < s_.R; ++r) {
      for (int t = 0; t < s_.S; ++t) {
        const int h = r * s_.dilation_h, w = t * s_.dilation_w;
        taps.push_back((h % s_.stride_h * s_.stride_w + w % s_.stride_w) * plane_ + h / s_.stride_h * pitch_ +
                       w / s_.stride_w);
      }
    }
  }

  // Outputs of a tile laid out with x's pitch, without what follows the last.
  ptrdiff_t flat_count() const { return (y_rows_.size() - 1) * pitch_ + y_cols_.size(); }

  void fprop(int m) {
    const int64_t k = int64_t{c_} * s_.M + m;
    const TensorRef y = dense<T>(call_.args.y, false, s_.K(), s_.P(), s_.Q());
    T* dst = const_cast<T*>(at<T>(y, image_, k, y_rows_.lo, y_cols_.lo));
    call_.kernels.conv_nchw({scratch_.x, scratch_.taps.data(), call_.packed_w + k * s_.R * s_.S, s_.R * s_.S,
                             call_.packed_bias[k], scratch_.out, flat_count()});
    call_.kernels.store_nchw({scratch_.out, pitch_, 0, 1, dst, y.h, y_rows_.size(), y_cols_.size(), {}});
  }

  void wgrad(int m) {
    if (y_rows_.size() == 0 || y_cols_.size() == 0) return;
    const int64_t k = int64_t{c_} * s_.M + m;
    // dy with x's pitch and zeros between its rows; the dgrad below stages its own, wider view from the cache.
    stage(call_.args.dy, k, plan_.rows.axis.out, plan_.cols.axis.out, y_rows_, y_cols_, 1, 1, pitch_,
          y_rows_.size() * pitch_, {}, scratch_.wgrad_dy);
    A* dw = scratch_.sums + c_ * plan_.sums_per_block + int64_t{m} * s_.R * s_.S;
    call_.kernels.wgrad_nchw({scratch_.x, scratch_.taps.data(), s_.R * s_.S, scratch_.wgrad_dy, flat_count(), dw});
  }

  void dgrad() {
    if (dx_rows_.size() == 0 || dx_cols_.size() == 0) return;
    const Span dy_rows = plan_.rows.axis.reads_dy(dx_rows_), dy_cols = plan_.cols.axis.reads_dy(dx_cols_);
    const ptrdiff_t pitch = dy_cols.size(), plane = dy_rows.size() * pitch;
    for (int m = 0; m < s_.M; ++m) {
      stage(call_.args.dy, int64_t{c_} * s_.M + m, plan_.rows.axis.out, plan_.cols.axis.out, dy_rows, dy_cols, 1, 1,
            pitch, plane, {}, scratch_.dy + m * plan_.dy_tile);
    }
    const TensorRef dx = dense<T>(call_.args.dx, false, s_.C, s_.H, s_.W);
    const TensorRef& x = call_.args.x;
    const int phases = std::min(s_.stride_w, dx_cols_.size());
    for (int i = 0; i < std::min(s_.stride_h, dx_rows_.size()); ++i) {
      const int rows = (dx_rows_.size() - i + s_.stride_h - 1) / s_.stride_h;
      const ptrdiff_t out_plane = rows * pitch + kSlack;
      for (int j = 0; j < phases; ++j) {
        const int cols = (dx_cols_.size() - j + s_.stride_w - 1) / s_.stride_w;
        dgrad_class(i, j, dy_rows.lo, dy_cols.lo, pitch, (rows - 1) * pitch + cols, scratch_.out + j * out_plane);
      }
      T* dst = const_cast<T*>(at<T>(dx, image_, c_, dx_rows_.lo + i, dx_cols_.lo));
      AffineGrad<A> grad{affine_, nullptr, 0, 0, nullptr, nullptr};
      if (affine_.any) {
        A* sums = scratch_.sums + c_ * plan_.sums_per_block + plan_.taps;
        const T* src = at<T>(x, image_, c_, dx_rows_.lo + i, dx_cols_.lo);
        grad = {affine_, src, s_.stride_h * x.h, 1, sums, sums + 1};
      }
      call_.kernels.store_nchw(
          {scratch_.out, pitch, out_plane, phases, dst, s_.stride_h * dx.h, rows, dx_cols_.size(), grad});
    }
  }

  void dgrad_class(int i, int j, int row_lo, int col_lo, ptrdiff_t pitch, ptrdiff_t count, A* out) {
    const int h = dx_rows_.lo + i + s_.pad_top, w = dx_cols_.lo + j + s_.pad_left;
    const int a = h % s_.stride_h, b = w % s_.stride_w;
    const TapClass &rows = plan_.row_classes[a], &cols = plan_.col_classes[b];
    const ptrdiff_t base = (h / s_.stride_h - row_lo) * pitch + (w / s_.stride_w - col_lo);
    std::vector<ptrdiff_t>& taps = scratch_.taps;
    taps.clear();
    for (int m = 0; m < s_.M; ++m) {
      for (int r = 0; r < static_cast<int>(rows.taps.size()); ++r) {
        for (int t = 0; t < static_cast<int>(cols.taps.size()); ++t) {
          taps.push_back(m * plan_.dy_tile + base + (rows.first + r * rows.step) * pitch + cols.first + t * cols.step);
        }
      }
    }
    const A* weights = call_.packed_w + int64_t{c_} * plan_.taps + plan_.class_start[a * s_.stride_w + b];
    call_.kernels.conv_nchw({scratch_.dy, taps.data(), weights, static_cast<int>(taps.size()), A{0}, out, count});
  }

  const Call<T>& call_;
  const ConvShape& s_;
  const Plan& plan_;
  Scratch<A>& scratch_;
  const int64_t image_;
  const int c_;
  const Affine<A> affine_;
  const Span y_rows_, y_cols_;
  Span x_rows_{}, x_cols_{}, dx_rows_{}, dx_cols_{};
  ptrdiff_t pitch_ = 0, plane_ = 0;
};

}  // namespace xsep::cpu

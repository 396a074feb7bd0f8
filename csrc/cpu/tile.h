// A tile of one image: some rows and columns, `block_` channels deep, or many blocks in NHWC.  Vectors run along
// channels.
//
// NHWC is read from and written to the tensors directly.  NCHW, fewer channels than a block, a channel multiplier and a
// function on load go through staged tiles that fit into the nearest caches.
//
// Bytes: x (or dy) once, plus the halo between tiles from the second-level cache; y (or dx) once.
#pragma once

#include "call.h"

namespace xsep::cpu {

template <class T>
class Tile {
  using A = accumulate_t<T>;

 public:
  Tile(const Call<T>& call, Scratch<A>& scratch, const Item& item)
      : call_(call),
        s_(call.shape),
        plan_(call.plan),
        scratch_(scratch),
        image_(item.image),
        b_(item.block),
        blocks_(item.blocks),
        c0_(static_cast<int>(plan_.first_channel(b_))),
        row_tile_(item.row_tile),
        direct_(plan_.direct) {
    const Cut &rows = direct_ ? plan_.rows : plan_.staged_rows, &cols = plan_.cols;
    y_rows_ = rows.y(item.row_tile);
    y_cols_ = cols.y(item.col_tile);
    if (plan_.reads_x) {
      x_rows_ = rows.staged_x(item.row_tile);
      x_cols_ = cols.staged_x(item.col_tile);
    }
    if (plan_.reads_dy) {
      dy_rows_ = rows.staged_dy(item.row_tile);
      dy_cols_ = cols.staged_dy(item.col_tile);
      dx_rows_ = rows.x(item.row_tile);
      dx_cols_ = cols.x(item.col_tile);
    }
  }

  void run() {
    if (plan_.reads_x && !direct_) stage_x();
    for (int m = 0; m < s_.M; ++m) {
      if (plan_.reads_dy && !direct_) stage_dy(m);
      if (call_.args.pass == Pass::kFprop) fprop(m);
      if (plan_.makes_dx) dgrad(m);
      if (plan_.makes_dw) wgrad(m);
    }
    if (plan_.makes_dx && !direct_) store_dx();
  }

 private:
  int first_channel(int b) const { return static_cast<int>(plan_.first_channel(b)); }
  int lanes(int b) const { return std::min(block_, s_.C - first_channel(b)); }
  ptrdiff_t tile_pixel() const { return ptrdiff_t{blocks_} * block_; }
  // From the first channel of the first block to that of the last.
  ptrdiff_t last() const { return plan_.first_channel(b_ + blocks_ - 1) - c0_; }

  // A window of a tensor of which channel c * multiplier + m belongs to x's channel c.
  void stage(const TensorRef& t, int multiplier, int m, Span rows, Span cols, ptrdiff_t ahead, bool on_load, A* tile) {
    const auto stage = call_.args.nhwc ? call_.kernels.stage_nhwc : call_.kernels.stage_nchw;
    for (int b = b_; b < b_ + blocks_; ++b) {
      const T* src = at<T>(t, image_, int64_t{first_channel(b)} * multiplier + m, rows.lo, cols.lo);
      stage({src, t.h, t.w, t.c * multiplier, rows.size(), cols.size(), lanes(b), ahead,
             on_load ? call_.affine(b) : Affine<A>{}, tile + (b - b_) * block_, tile_pixel(), block_, false});
    }
  }
  // From a staged tile to the next one of the thread: the rows below, or the top of the next blocks of channels.
  ptrdiff_t ahead(const TensorRef& t, int multiplier, Span (Cut::*span)(int) const) const {
    const Cut& rows = plan_.staged_rows;
    const bool last = row_tile_ + 1 == rows.tiles;
    const int down = (rows.*span)(last ? 0 : row_tile_ + 1).lo - (rows.*span)(row_tile_).lo;
    return down * t.h + (last ? tile_pixel() * multiplier * t.c : 0);
  }
  void stage_x() {
    const TensorRef& x = call_.args.x;
    stage(x, 1, 0, x_rows_, x_cols_, ahead(x, 1, &Cut::staged_x), true, scratch_.x);
  }
  void stage_dy(int m) {
    const TensorRef& dy = call_.args.dy;
    stage(dy, s_.M, m, dy_rows_, dy_cols_, ahead(dy, s_.M, &Cut::staged_dy), false, scratch_.dy);
  }

  // An array of pixels, of the tensor or of the tile staged from `rows` x `cols` of it.  The outputs' first row and
  // column are in the tensor's coordinates.
  Pixels pixels(const TensorRef& t, int H, int W, const A* tile, Span rows, Span cols, int first_row,
                int first_col) const {
    if (direct_) return {at<T>(t, image_, c0_, 0, 0), t.h, t.w, H, W, first_row, first_col, 1, 1, 1, 1};
    return {tile,
            cols.size() * tile_pixel(),
            tile_pixel(),
            rows.size(),
            cols.size(),
            first_row - rows.lo,
            first_col - cols.lo,
            1,
            1,
            1,
            1};
  }
  Pixels x_pixels() const {
    Pixels x = pixels(call_.args.x, s_.H, s_.W, scratch_.x, x_rows_, x_cols_, y_rows_.lo * s_.stride_h - s_.pad_top,
                      y_cols_.lo * s_.stride_w - s_.pad_left);
    x.step_row = s_.stride_h, x.step_col = s_.stride_w;
    x.tap_row = s_.dilation_h, x.tap_col = s_.dilation_w;
    return x;
  }

  // The outputs of a staged tile.
  void store(const TensorRef& t, int multiplier, int m, Span rows, Span cols) const {
    const auto store = call_.args.nhwc ? call_.kernels.store_nhwc : call_.kernels.store_nchw;
    for (int b = b_; b < b_ + blocks_; ++b) {
      T* dst = const_cast<T*>(at<T>(t, image_, int64_t{first_channel(b)} * multiplier + m, rows.lo, cols.lo));
      store({scratch_.out + (b - b_) * block_, tile_pixel(), block_, dst, t.h, t.w, t.c * multiplier, rows.size(),
             cols.size(), lanes(b), affine_grad(b), plan_.planes ? scratch_.planes : nullptr});
    }
  }
  AffineGrad<A> affine_grad(int b) const {
    const Affine<A> affine = call_.affine(b);
    if (!affine.any || !plan_.makes_dx) return {};
    const TensorRef& x = call_.args.x;
    A* sums = scratch_.sums + b * plan_.sums_per_block + int64_t{plan_.taps} * block_;
    return {affine, at<T>(x, image_, first_channel(b), dx_rows_.lo, dx_cols_.lo), x.h, x.w, x.c, sums, sums + block_,
            0};
  }

  bool streams(const T* dst, const TensorRef& out) const {
    return plan_.stream && reinterpret_cast<uintptr_t>(dst) % 64 == 0 && out.w * sizeof(T) % 64 == 0;
  }

  void fprop(int m) {
    const TensorRef y = dense<T>(call_.args.y, call_.args.nhwc, s_.K(), s_.P(), s_.Q());
    const A* weights = call_.packed_w + (int64_t{b_} * s_.M + m) * s_.R * s_.S * block_;
    const A* bias = call_.packed_bias + (int64_t{b_} * s_.M + m) * block_;
    const int rows = y_rows_.size(), cols = y_cols_.size();
    const int64_t next = int64_t{plan_.taps} * block_;
    if (direct_) {
      T* dst = const_cast<T*>(at<T>(y, image_, c0_, y_rows_.lo, y_cols_.lo));
      call_.kernels.conv({x_pixels(), s_.R, s_.S, weights, next, bias, dst, y.h, y.w, rows, cols, blocks_, last(),
                          plan_.far, streams(dst, y)});
      return;
    }
    call_.kernels.conv_staged({x_pixels(), s_.R, s_.S, weights, next, bias, scratch_.out, cols * tile_pixel(),
                               tile_pixel(), rows, cols, blocks_, last(), false, false});
    store(y, s_.M, m, y_rows_, y_cols_);
  }

  // Positions of one residue modulo the stride are an ordinary convolution with the taps of that residue.
  void dgrad(int m) {
    for (int i = 0; i < std::min(s_.stride_h, dx_rows_.size()); ++i) {
      for (int j = 0; j < std::min(s_.stride_w, dx_cols_.size()); ++j) dgrad_class(m, i, j);
    }
  }

  void dgrad_class(int m, int i, int j) {
    const int h = dx_rows_.lo + i + s_.pad_top, w = dx_cols_.lo + j + s_.pad_left;
    const int a = h % s_.stride_h, b = w % s_.stride_w;
    const TapClass &rows = plan_.row_classes[a], &cols = plan_.col_classes[b];
    Pixels dy = pixels(call_.args.dy, s_.P(), s_.Q(), scratch_.dy, dy_rows_, dy_cols_, h / s_.stride_h + rows.first,
                       w / s_.stride_w + cols.first);
    dy.tap_row = rows.step, dy.tap_col = cols.step;
    const int tap_rows = static_cast<int>(rows.taps.size()), tap_cols = static_cast<int>(cols.taps.size());
    const int64_t start = plan_.class_start[a * s_.stride_w + b] + int64_t{m} * tap_rows * tap_cols;
    const A* weights = call_.packed_w + (int64_t{b_} * plan_.taps + start) * block_;
    const A* init = m == 0 ? call_.packed_bias : nullptr;  // zeros, or what the filters before m have summed
    const int out_rows = (dx_rows_.size() - i + s_.stride_h - 1) / s_.stride_h;
    const int out_cols = (dx_cols_.size() - j + s_.stride_w - 1) / s_.stride_w;
    if (direct_) {
      const TensorRef dx = dense<T>(call_.args.dx, call_.args.nhwc, s_.C, s_.H, s_.W);
      T* dst = const_cast<T*>(at<T>(dx, image_, c0_, dx_rows_.lo + i, dx_cols_.lo + j));
      call_.kernels.conv({dy, tap_cols ? tap_rows : 0, tap_cols, weights, int64_t{plan_.taps} * block_, init, dst,
                          s_.stride_h * dx.h, s_.stride_w * dx.w, out_rows, out_cols, blocks_, last(), plan_.far,
                          streams(dst, dx)});
      return;
    }
    const ptrdiff_t row = dx_cols_.size() * tile_pixel();
    call_.kernels.conv_staged({dy, tap_cols ? tap_rows : 0, tap_cols, weights, int64_t{plan_.taps} * block_, init,
                               scratch_.out + i * row + j * tile_pixel(), s_.stride_h * row, s_.stride_w * tile_pixel(),
                               out_rows, out_cols, blocks_, last(), false, false});
  }

  void store_dx() {
    if (dx_rows_.size() == 0 || dx_cols_.size() == 0) return;
    store(dense<T>(call_.args.dx, call_.args.nhwc, s_.C, s_.H, s_.W), 1, 0, dx_rows_, dx_cols_);
  }

  void wgrad(int m) {
    if (y_rows_.size() == 0 || y_cols_.size() == 0) return;
    A* dw = scratch_.sums + b_ * plan_.sums_per_block + int64_t{m} * s_.R * s_.S * block_;
    if (direct_) {
      const TensorRef& dy = call_.args.dy;
      call_.kernels.wgrad({x_pixels(), s_.R, s_.S, at<T>(dy, image_, c0_, y_rows_.lo, y_cols_.lo), dy.h, dy.w,
                           y_rows_.size(), y_cols_.size(), blocks_, last(), dw, plan_.sums_per_block, plan_.far,
                           plan_.large});
      return;
    }
    const ptrdiff_t row = dy_cols_.size() * tile_pixel();
    const A* dy = scratch_.dy + (y_rows_.lo - dy_rows_.lo) * row + (y_cols_.lo - dy_cols_.lo) * tile_pixel();
    call_.kernels.wgrad_staged({x_pixels(), s_.R, s_.S, dy, row, tile_pixel(), y_rows_.size(), y_cols_.size(), blocks_,
                                last(), dw, plan_.sums_per_block, false, false});
  }

  const Call<T>& call_;
  const ConvShape& s_;
  const Plan& plan_;
  Scratch<A>& scratch_;
  const int64_t image_;
  const int b_, blocks_, c0_, row_tile_;
  static constexpr int block_ = kBlock<A>;
  const bool direct_;
  Span y_rows_{}, y_cols_{}, x_rows_{}, x_cols_{}, dy_rows_{}, dy_cols_{}, dx_rows_{}, dx_cols_{};
};

}  // namespace xsep::cpu

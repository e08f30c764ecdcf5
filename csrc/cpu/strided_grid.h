// CM logits on a grid coarser than the pixels: interpolated here, never stored at pixel resolution.
//
// Lanes are neighbouring pixels of a row. Down a column of pixels inside one grid cell the logits are linear, so their
// exponentials are a geometric sequence: over `rows` <= 8 rows of a segment
//
//   e[row] = e0 g^row,   e0 = exp(a[first row] - m),   g = exp(slope)
//
// costs two exponentials and a multiply per row. m is the column maximum over the segment, so that all e <= 1. The
// gradient of e's logits at the two grid rows needs the sums of v[row] e[row] and of row v[row] e[row], v being the
// coefficients of coarse_math.h: one Horner scheme gives both (the second is g times the derivative of the first).
//
// Where the logits change by more than kMaxSpan over a segment, terms could underflow that matter; there, and where D
// is small, pixels are taken one row at a time in log space.
//
// A band is a row of grid cells (or a part of it). Its two rows of logits are copied to float rows first (`grid_`),
// which also takes care of the storage type and of the depth interpolation of volumes; its gradients are summed in two
// such rows
// (`sum_`) and added to the output at the end. ops.cpp runs bands that share no grid row at the same time, in fixed
// order.
#pragma once

#include "common.h"

namespace coarse {
namespace {

// Lost terms are below exp(-87 + 20) of the largest of their row, and D >= 1e-12 makes that 1e-17 of the result.
template <class R>
constexpr R kMaxSpan = sizeof(R) == 4 ? R(20) : R(200);
template <class R>
constexpr R kSmallestGeometricEvidence = sizeof(R) == 4 ? R(1e-12) : R(1e-100);

template <class R>
class StridedGridBand {
  using V = Vec<R>;
  using I = typename Lanes<V>::Int;
  static constexpr int N = kLanes<R>;

 public:
  StridedGridBand(const Stream<R>& s, const StridedGrid<R>& g, void* workspace) : s_(s), g_(g), arena_(workspace) {
    const int64_t c = s.classes, rows = kMaxRows;
    pitch_ = round_up(g.x.grid, N) + 2 * N;  // a strip reads 2 N points from any point on
    want_cm_ = s.cm_gradient != nullptr;
    for (R*& grid : grid_) grid = arena_.take<R>(c * c * pitch_);
    for (R*& sum : sum_) sum = want_cm_ ? arena_.take<R>(c * c * pitch_) : nullptr;
    deeper_ = arena_.take<R>(pitch_);
    first_ = arena_.take<V>(c * c);
    ratio_ = arena_.take<V>(c * c);
    top_sum_ = arena_.take<V>(c * c);
    bottom_sum_ = arena_.take<V>(c * c);
    reported_ = arena_.take<V>(c * rows);
    p_ = arena_.take<V>(c * rows);
    q_ = arena_.take<V>(c * rows);
    inv_z_ = arena_.take<V>(c * rows);
    ajj_ = arena_.take<V>(c * rows);
    keep_ = arena_.take<V>(c * rows);
    drop_ = arena_.take<V>(c * rows);
    diag_ = arena_.take<V>(c * rows);
    scatter_ = arena_.take<V>(2 * N);
    labels_.take(arena_, rows * N);
    slow_.take(arena_, c);
  }

  int64_t workspace_bytes() const { return arena_.used(); }

  void run(int64_t task, Band band, int64_t z, int64_t b0, int64_t b1) {
    task_ = task;
    z_ = z;
    for (image_ = b0; image_ < b1; ++image_) {
      if (image_ == b0 || s_.cm_batch > 1) load_grid_rows(band.cell);
      if (want_cm_) {
        for (R* sum : sum_) memset(sum, 0, sizeof(R) * s_.classes * s_.classes * pitch_);
      }
      for (int64_t x = 0; x < s_.width; x += N) strip(band, x);
      if (want_cm_) add_grid_rows(band);
    }
  }

 private:
  int classes() const { return s_.classes; }

  // --- grid rows in and out ------------------------------------------------------------------------------------------

  int64_t grid_points() const { return g_.z.grid * g_.y.grid * g_.x.grid; }
  int64_t grid_offset(int64_t plane, int64_t z, int64_t y) const {
    return plane * grid_points() + (z * g_.y.grid + y) * g_.x.grid;
  }

  void load_grid_rows(int64_t cell) {
    const int64_t c = classes(), w = g_.x.grid;
    const int64_t z0 = g_.z.i0[z_], z1 = z0 + (z0 < g_.z.grid - 1);
    const R lambda = g_.z.lambda[z_];
    const int64_t image = s_.cm_batch == 1 ? 0 : image_ * s_.cm_batch_stride;
    for (int side = 0; side < 2; ++side) {
      const int64_t y = cell + (side == 1 && g_.y.interpolated && cell < g_.y.grid - 1);
      for (int64_t plane = 0; plane < c * c; ++plane) {
        R* row = grid_[side] + plane * pitch_;
        load_run(s_.cm_logits, s_.cm_storage, image + grid_offset(plane, z0, y), w, row);
        if (g_.z.grid > 1 && lambda != R(0)) {
          load_run(s_.cm_logits, s_.cm_storage, image + grid_offset(plane, z1, y), w, deeper_);
          for (int64_t k = 0; k < w; ++k) row[k] = (R(1) - lambda) * row[k] + lambda * deeper_[k];
        }
        for (int64_t k = w; k < pitch_; ++k) row[k] = row[w - 1];
      }
    }
  }

  void add_grid_rows(const Band& band) {
    const int64_t c = classes(), w = g_.x.grid;
    const int64_t z0 = g_.z.i0[z_], z1 = z0 + (z0 < g_.z.grid - 1);
    const R lambda = g_.z.lambda[z_];
    R* out = static_cast<R*>(s_.cm_gradient) + band.copy * g_.copy_stride;
    const int64_t image = s_.cm_batch == 1 ? 0 : image_ * c * c * grid_points();
    for (int side = 0; side < 2; ++side) {
      const int64_t y = band.cell + (side == 1 && g_.y.interpolated && band.cell < g_.y.grid - 1);
      for (int64_t plane = 0; plane < c * c; ++plane) {
        const R* sum = sum_[side] + plane * pitch_;
        R* to0 = out + image + grid_offset(plane, z0, y);
        R* to1 = out + image + grid_offset(plane, z1, y);
        for (int64_t k = 0; k < w; ++k) to0[k] += (R(1) - lambda) * sum[k];
        if (lambda == R(0)) continue;
        for (int64_t k = 0; k < w; ++k) to1[k] += lambda * sum[k];
      }
    }
  }

  // --- a strip: N pixels wide, as high as the band -------------------------------------------------------------------

  void strip(const Band& band, int64_t x) {
    x_ = x;
    lanes_ = s_.width - x < N ? s_.width - x : N;
    node_ = g_.x.i0[x];
    for (int k = 0; k < N; ++k) {
      const int64_t at = k < lanes_ ? x + k : x + lanes_ - 1;
      left_[k] = g_.x.i0[at] - node_;
      right_[k] = left_[k] + (g_.x.interpolated && g_.x.i0[at] < g_.x.grid - 1);
      lambda_x_[k] = g_.x.lambda[at];
    }
    nodes_ = static_cast<int>(right_[N - 1]) + 1;
    const V zero = broadcast<V>(R(0));
    if (want_cm_) {
      for (int64_t ij = 0; ij < static_cast<int64_t>(classes()) * classes(); ++ij)
        top_sum_[ij] = bottom_sum_[ij] = zero;
    }
    bool touched = false;
    for (int32_t k = band.begin; k < band.end; ++k) touched = segment(g_.segments[k]) || touched;
    if (want_cm_ && touched) scatter();
  }

  V interpolate_x(const R* row) const {
    const V low = load(row + node_), high = load(row + node_ + N);
    const V a = permute<R>(low, high, left_);
    if (!g_.x.interpolated) return a;  // 0 times -inf would be NaN
    const V b = permute<R>(low, high, right_);
    return (R(1) - lambda_x_) * a + lambda_x_ * b;
  }

  // Adds what top_sum_ and bottom_sum_ hold, lane by lane, to the grid points left and right of each lane.
  void scatter() {
    const int64_t entries = static_cast<int64_t>(classes()) * classes();
    for (int k = 0; k < 2 * N; ++k) scatter_[k] = broadcast<V>(R(0));
    R* weights = reinterpret_cast<R*>(scatter_);  // [half][lane][point]: what a lane gives to point (half * N + point)
    for (int k = 0; k < lanes_; ++k) {
      const auto add = [&](int64_t point, R weight) { weights[(point / N * N + k) * N + point % N] += weight; };
      add(left_[k], R(1) - lambda_x_[k]);
      add(right_[k], lambda_x_[k]);
    }
    V w[N];
    for (int half = 0; half * N < nodes_; ++half) {
      for (int k = 0; k < N; ++k) w[k] = scatter_[half * N + k];
      for (int64_t ij = 0; ij < entries; ++ij) {
        const R* top = reinterpret_cast<const R*>(top_sum_ + ij);
        const R* bottom = reinterpret_cast<const R*>(bottom_sum_ + ij);
        R* to_top = sum_[0] + ij * pitch_ + node_ + half * N;
        R* to_bottom = sum_[1] + ij * pitch_ + node_ + half * N;
        V even[2] = {load(to_top), load(to_bottom)};
        V odd[2] = {broadcast<V>(R(0)), broadcast<V>(R(0))};
        for (int k = 0; k < N; k += 2) {
          even[0] += top[k] * w[k];
          even[1] += bottom[k] * w[k];
          odd[0] += top[k + 1] * w[k + 1];
          odd[1] += bottom[k + 1] * w[k + 1];
        }
        store(to_top, even[0] + odd[0]);
        store(to_bottom, even[1] + odd[1]);
      }
    }
  }

  // --- a segment: up to kMaxRows rows of a strip ---------------------------------------------------------------------

  int64_t pixel(int64_t row) const { return ((image_ * s_.depth + z_) * s_.height + row) * s_.width + x_; }
  int64_t seg_offset(int64_t j, int64_t row) const {
    return (((image_ * classes() + j) * s_.depth + z_) * s_.height + row) * s_.width + x_;
  }

  // Returns whether it added anything to the gradient.
  bool segment(const RowSegment<R>& seg) {
    labels_.any_valid = false;
    labels_.all_valid = true;
    for (int r = 0; r < seg.rows; ++r) {
      if (labels_.read(s_, pixel(seg.y0 + r), lanes_, N, r * N)) s_.bad_label[task_] = 1;
    }
    const int c = classes();
    if (!labels_.any_valid && s_.posterior == nullptr) {
      zero_outputs(seg);
      return false;
    }
    report_run(s_.transition, c, labels_.label, static_cast<int64_t>(seg.rows) * N, reinterpret_cast<R*>(reported_),
               static_cast<int64_t>(kMaxRows) * N);
    softmax(seg);
    bool direct;
    switch (seg.rows) {
      case 1: direct = !columns<1>(seg); break;
      case 2: direct = !columns<2>(seg); break;
      case 4: direct = !columns<4>(seg); break;
      default: direct = !columns<8>(seg); break;
    }
    if (direct || !finish(seg)) {
      log_space(seg);
    } else if (want_cm_) {
      switch (seg.rows) {
        case 1: gradient<1>(seg); break;
        case 2: gradient<2>(seg); break;
        case 4: gradient<4>(seg); break;
        default: gradient<8>(seg); break;
      }
    }
    write_seg(seg);
    return true;
  }

  void load_seg(int64_t row, V* to, int stride) const {
    for (int j = 0; j < classes(); ++j) {
      R run[N] = {};
      load_run(s_.seg_logits, s_.seg_storage, seg_offset(j, row), lanes_, run);
      to[j * stride] = load(run);
    }
  }

  V valid(int r) const { return load(labels_.valid + r * N); }

  void softmax(const RowSegment<R>& seg) {
    const int c = classes();
    const V zero = broadcast<V>(R(0));
    for (int r = 0; r < seg.rows; ++r) {
      load_seg(seg.y0 + r, p_ + r, kMaxRows);
      if (!labels_.all_valid && s_.posterior == nullptr) {
        for (int j = 0; j < c; ++j) p_[j * kMaxRows + r] = select(valid(r) != zero, p_[j * kMaxRows + r], zero);
      }
      V top = p_[r], sum = zero;
      for (int j = 1; j < c; ++j) top = max_v(p_[j * kMaxRows + r], top);
      for (int j = 0; j < c; ++j) {
        p_[j * kMaxRows + r] = exp_v(p_[j * kMaxRows + r] - top);
        sum += p_[j * kMaxRows + r];
      }
      const V inv = R(1) / sum;
      for (int j = 0; j < c; ++j) p_[j * kMaxRows + r] *= inv;
    }
  }

  // Z, q and A[j,j] of every column and row. False where the logits change too much for geometric sequences.
  template <int kRows>
  bool columns(const RowSegment<R>& seg) {
    const int c = classes();
    const V zero = broadcast<V>(R(0)), limit = broadcast<V>(kMaxSpan<R>);
    const V lambda = broadcast<V>(seg.lambda0), step = broadcast<V>(seg.step);
    const R last = static_cast<R>(kRows - 1);
    I steep = zero != zero;
    for (int j = 0; j < c; ++j) {
      V top = broadcast<V>(-std::numeric_limits<R>::infinity());
      for (int i = 0; i < c; ++i) {
        const int64_t ij = static_cast<int64_t>(i) * c + j;
        const V a = interpolate_x(grid_[0] + ij * pitch_), b = interpolate_x(grid_[1] + ij * pitch_);
        const V first = a + lambda * (b - a), slope = step * (b - a), end = first + last * slope;
        top = max_v(max_v(first, end), top);
        steep |= !((end - first <= limit) & (first - end <= limit));  // NaN is steep
        first_[ij] = first;
        ratio_[ij] = slope;
      }
      V z[kRows], q[kRows], diagonal[kRows];
      for (int r = 0; r < kRows; ++r) z[r] = q[r] = diagonal[r] = zero;
      for (int i = 0; i < c; ++i) {
        const int64_t ij = static_cast<int64_t>(i) * c + j;
        V e = exp_v(first_[ij] - top);
        const V g = kRows > 1 ? exp_v(ratio_[ij]) : zero;
        first_[ij] = e;
        ratio_[ij] = g;
        for (int r = 0; r < kRows; ++r) {
          z[r] += e;
          q[r] += e * reported_[i * kMaxRows + r];
          if (i == j) diagonal[r] = e;
          e *= g;
        }
      }
      for (int r = 0; r < kRows; ++r) {
        const int at = j * kMaxRows + r;
        inv_z_[at] = R(1) / z[r];
        q_[at] = q[r] * inv_z_[at];
        ajj_[at] = diagonal[r] * inv_z_[at];
      }
    }
    return !any(steep);
  }

  // Loss, posterior and gradient coefficients of every row; false, and nothing added, where probabilities are too
  // small.
  bool finish(const RowSegment<R>& seg) {
    const int c = classes();
    const V zero = broadcast<V>(R(0));
    V d[kMaxRows];
    for (int r = 0; r < seg.rows; ++r) {
      d[r] = zero;
      for (int j = 0; j < c; ++j) d[r] += p_[j * kMaxRows + r] * q_[j * kMaxRows + r];
      if (any(!(d[r] >= broadcast<V>(kSmallestGeometricEvidence<R>)))) return false;
    }
    if (s_.transition_gradient != nullptr) transition_gradient(seg, d);
    for (int r = 0; r < seg.rows; ++r) {
      const V inv_d = R(1) / d[r];
      const V scaled = load(labels_.weight + r * N) * s_.gradient_scale, scaled_trace = scaled * s_.trace_weight;
      V trace = zero;
      for (int j = 0; j < c; ++j) {
        const int at = j * kMaxRows + r;
        const V p = p_[at], posterior = p * q_[at] * inv_d;
        const auto g = column_gradient(p, posterior, inv_d, inv_z_[at], ajj_[at], scaled, scaled_trace);
        keep_[at] = g.keep;
        drop_[at] = g.drop;
        diag_[at] = g.diag;
        trace += ajj_[at];
        q_[at] = posterior;
        if (s_.posterior == nullptr) p_[at] = scaled * (p - posterior);
      }
      add_terms(seg, r, -log_v(d[r]), trace);
    }
    return true;
  }

  void add_terms(const RowSegment<R>& seg, int r, V nll, V trace) {
    const V weight = load(labels_.weight + r * N), zero = broadcast<V>(R(0));
    nll = select(weight == zero, zero, weight * nll);  // 0 * inf is not 0
    trace = select(weight == zero, zero, weight * trace);
    s_.sums[2 * task_] += sum_lanes<R>(nll);
    s_.sums[2 * task_ + 1] += sum_lanes<R>(trace);
    if (s_.nll_map == nullptr) return;
    const int64_t at = pixel(seg.y0 + r);
    for (int64_t k = 0; k < lanes_; ++k) {
      s_.nll_map[at + k] = nll[k];
      s_.trace_map[at + k] = trace[k];
    }
  }

  // Sums over the rows of the gradient at the upper and the lower grid row, lane by lane.
  template <int kRows>
  void gradient(const RowSegment<R>& seg) {
    const int c = classes();
    const V zero = broadcast<V>(R(0));
    for (int j = 0; j < c; ++j) {
      V keep[kRows], drop[kRows];
      for (int r = 0; r < kRows; ++r) {
        keep[r] = keep_[j * kMaxRows + r];
        drop[r] = drop_[j * kMaxRows + r];
      }
      for (int i = 0; i < c; ++i) {
        const int64_t ij = static_cast<int64_t>(i) * c + j;
        const V g = ratio_[ij];
        V value = zero, derivative = zero;  // of the polynomial sum_r v[r] g^r
        for (int r = kRows - 1; r >= 0; --r) {
          derivative = derivative * g + value;
          value = value * g + (keep[r] - drop[r] * reported_[i * kMaxRows + r]);
        }
        V sum = first_[ij] * value, sum_rows = first_[ij] * (g * derivative);
        if (i == j) {
          for (int r = 0; r < kRows; ++r) {
            sum += diag_[j * kMaxRows + r];
            sum_rows += static_cast<R>(r) * diag_[j * kMaxRows + r];
          }
        }
        add_sums(ij, seg, sum, sum_rows);
      }
    }
  }

  void add_sums(int64_t ij, const RowSegment<R>& seg, V sum, V sum_rows) {
    const V lower = seg.lambda0 * sum + seg.step * sum_rows;
    bottom_sum_[ij] += lower;
    top_sum_[ij] += sum - lower;
  }

  // d loss / dT[i, y] -= weight / D * sum_j A[i,j] p[j]
  void transition_gradient(const RowSegment<R>& seg, const V* d) {
    const int c = classes();
    double* sum = s_.transition_gradient + task_ * c * c;
    for (int i = 0; i < c; ++i) {
      V ap[kMaxRows];
      for (int r = 0; r < seg.rows; ++r) ap[r] = broadcast<V>(R(0));
      for (int j = 0; j < c; ++j) {
        V e = first_[static_cast<int64_t>(i) * c + j];
        const V g = ratio_[static_cast<int64_t>(i) * c + j];
        for (int r = 0; r < seg.rows; ++r) {
          ap[r] += e * (inv_z_[j * kMaxRows + r] * p_[j * kMaxRows + r]);
          e *= g;
        }
      }
      for (int r = 0; r < seg.rows; ++r) {
        const V share = ap[r] * (load(labels_.weight + r * N) * s_.gradient_scale) / d[r];
        for (int k = 0; k < N; ++k) sum[i * c + labels_.label[r * N + k]] -= static_cast<double>(share[k]);
      }
    }
  }

  void log_space(const RowSegment<R>& seg) {
    const int c = classes();
    const V zero = broadcast<V>(R(0));
    for (int r = 0; r < seg.rows; ++r) {
      const V labelled = valid(r), lambda = broadcast<V>(seg.lambda0 + static_cast<R>(r) * seg.step);
      load_seg(seg.y0 + r, slow_.s, 1);
      if (s_.posterior == nullptr) {
        for (int j = 0; j < c; ++j) slow_.s[j] = select(labelled != zero, slow_.s[j], zero);
      }
      for (int64_t ij = 0; ij < static_cast<int64_t>(c) * c; ++ij) {
        const V a = interpolate_x(grid_[0] + ij * pitch_), b = interpolate_x(grid_[1] + ij * pitch_);
        const V x = g_.y.interpolated ? (R(1) - lambda) * a + lambda * b : a;
        slow_.a[ij] = select(labelled != zero, x, zero);
      }
      const V scaled = load(labels_.weight + r * N) * s_.gradient_scale, scaled_trace = scaled * s_.trace_weight;
      const bool want_reported = s_.transition_gradient != nullptr;
      const auto terms = slow_.run(c, s_.transition, labels_.label + r * N, scaled, scaled_trace, want_reported);
      if (want_reported) slow_.add_reported(c, labels_.label + r * N, s_.transition_gradient + task_ * c * c);
      add_terms(seg, r, terms.nll, terms.trace);
      for (int j = 0; j < c; ++j) {
        const int at = j * kMaxRows + r;
        q_[at] = slow_.r[j];
        const V difference = select(scaled == zero, zero, scaled * (slow_.p[j] - slow_.r[j]));
        p_[at] = s_.posterior == nullptr ? difference : slow_.p[j];
      }
      if (!want_cm_) continue;
      for (int64_t ij = 0; ij < static_cast<int64_t>(c) * c; ++ij) {
        add_sums(ij, seg, slow_.a[ij], static_cast<R>(r) * slow_.a[ij]);
      }
    }
  }

  // After `finish` or `log_space`, p_ holds the gradient of the class logits (or p), and q_ the posterior.
  void write_seg(const RowSegment<R>& seg) {
    for (int r = 0; r < seg.rows; ++r) {
      for (int j = 0; j < classes(); ++j) {
        const int at = j * kMaxRows + r;
        const int64_t offset = seg_offset(j, seg.y0 + r);
        R run[N];
        if (s_.seg_gradient != nullptr) {
          store(run, p_[at]);
          store_run(s_.seg_gradient, s_.seg_storage, offset, lanes_, run);
        }
        if (s_.posterior != nullptr) {
          store(run, select(valid(r) != broadcast<V>(R(0)), q_[at], p_[at]));
          store_run(s_.posterior, s_.seg_storage, offset, lanes_, run);
        }
      }
    }
  }

  void zero_outputs(const RowSegment<R>& seg) {
    const R zeros[N] = {};
    for (int r = 0; r < seg.rows; ++r) {
      if (s_.nll_map != nullptr) {
        for (int64_t k = 0; k < lanes_; ++k)
          s_.nll_map[pixel(seg.y0 + r) + k] = s_.trace_map[pixel(seg.y0 + r) + k] = R(0);
      }
      if (s_.seg_gradient == nullptr) continue;
      for (int j = 0; j < classes(); ++j) {
        store_run(s_.seg_gradient, s_.seg_storage, seg_offset(j, seg.y0 + r), lanes_, zeros);
      }
    }
  }

  const Stream<R>& s_;
  const StridedGrid<R>& g_;
  Arena arena_;
  bool want_cm_;
  int64_t pitch_, task_ = 0, image_ = 0, z_ = 0;
  R *grid_[2], *sum_[2];  // (C * C, pitch) logits and gradient of the band's upper and lower grid row
  R* deeper_;             // one row of the next slice of the grid
  // the strip
  int64_t x_ = 0, lanes_ = 0, node_ = 0;  // first pixel, pixels, grid point left of the first pixel
  int nodes_ = 0;                         // grid points in reach
  I left_{}, right_{};                    // each lane's grid points, from node_
  V lambda_x_{};
  V *top_sum_, *bottom_sum_, *scatter_;  // (C * C) gradient at the upper and lower grid row, by lane
  // the segment
  V *first_, *ratio_;                                              // (C * C) e0 and g
  V *reported_, *p_, *q_, *inv_z_, *ajj_, *keep_, *drop_, *diag_;  // (C, kMaxRows)
  LabelRun<R> labels_;
  LogSpace<R> slow_;
};

template <class R>
int64_t strided_workspace(const Stream<R>& s, const StridedGrid<R>& g) {
  return StridedGridBand<R>(s, g, nullptr).workspace_bytes();
}

template <class R>
void strided_grid(const Stream<R>& s, const StridedGrid<R>& g, int64_t task, Band band, int64_t z, int64_t b0,
                  int64_t b1, void* workspace) {
  StridedGridBand<R>(s, g, workspace).run(task, band, z, b0, b1);
}

}  // namespace
}  // namespace coarse

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
// such rows (GradientRows). Going down a chunk of the image, the lower row of a cell becomes the upper one of the next.
//
// Several layers of labels share the matrix, and so the exponentials: each adds its q, its posterior, and its
// coefficients.
//
// Drawings are coherent: a segment has few labels in each layer, mostly one. Of one, T[i, y] is one number for each i
// (`Reports::one_row`). Of positive drawings T[i, y] is 0 but where i is one of the few (`Reports::few_labels`): q and
// the second coefficient of the gradient cost nothing for the other i, and two of three multiply-adds of a pixel and
// class pair are left.
#pragma once

#include "class_field.h"

namespace coarse {
namespace {

// Lost terms are below exp(-87 + 20) of the largest of their row, and D >= 1e-12 makes that 1e-17 of the result.
template <class R>
constexpr R kMaxSpan = sizeof(R) == 4 ? R(20) : R(200);
template <class R>
constexpr R kSmallestGeometricEvidence = sizeof(R) == 4 ? R(1e-12) : R(1e-100);

// What is known of T[i, y] in a segment.
enum class Reports { mixed, one_row, few_labels };

template <class R>
class StridedGrid {
  using V = Vec<R>;
  using I = typename Lanes<V>::Int;
  static constexpr int N = kLanes<R>;

 public:
  void init(const Problem<R>& problem, const Plan<R>& plan, int index, Arena& arena) {
    problem_ = &problem;
    kind_ = &problem.kinds[index];
    g_ = &plan.kinds[index];
    const int64_t c = problem.classes, rows = kMaxRows, layers = kind_->layers;
    pitch_ = round_up(g_->span, N) + 2 * N;  // a strip reads 2 N points from any point on
    want_cm_ = kind_->field.gradient != nullptr;
    for (R*& grid : grid_) grid = arena.take<R>(c * c * pitch_);
    if (want_cm_) sums_.init(kind_->field, *g_, c * c, plan.chunk_count, arena);
    deeper_ = arena.take<R>(pitch_);
    first_ = arena.take<V>(c * c);
    ratio_ = arena.take<V>(c * c);
    top_sum_ = arena.take<V>(c * c);
    bottom_sum_ = arena.take<V>(c * c);
    reported_ = arena.take<V>(layers * c * rows);
    q_ = arena.take<V>(layers * c * rows);
    drop_ = arena.take<V>(layers * c * rows);
    inv_z_ = arena.take<V>(c * rows);
    ajj_ = arena.take<V>(c * rows);
    keep_ = arena.take<V>(c * rows);
    diag_ = arena.take<V>(c * rows);
    scatter_ = arena.take<V>(2 * N);
    few_ = arena.take<int32_t>(layers * c);
    few_count_ = arena.take<int>(layers);
    slow_.take(arena, c);
  }

  // Slice z of an image.
  void start(int64_t image, int64_t group, int64_t chunk, int64_t z, bool first) {
    if (want_cm_) sums_.start(image, group, chunk, z, first);
    if (image != image_ || z != z_) loaded_[0] = loaded_[1] = -1;
    image_ = image;
    z_ = z;
    x_first_ = g_->x_first[chunk];
    x_count_ = g_->x_count[chunk];
  }

  void enter(const Band& band) {
    cell_ = g_->y.i0[band.y0];
    lower_ = g_->y.after(cell_);
    if (loaded_[1] == cell_) {  // one cell further down
      R* const upper = grid_[0];
      grid_[0] = grid_[1];
      grid_[1] = upper;
      loaded_[0] = cell_;
      loaded_[1] = -1;
    }
    if (loaded_[0] != cell_) load_grid_row(0, cell_);
    if (lower_ != cell_ && loaded_[1] != lower_) load_grid_row(1, lower_);
    if (want_cm_) sums_.need(cell_, lower_);
  }

  void finish() {
    if (want_cm_) sums_.finish();
  }

  // N pixels wide, as high as the band.
  void enter_strip(int64_t x0, int64_t x1) {
    lanes_ = x1 - x0;
    columns_.find(g_->x, x0, lanes_);
    touched_ = false;
    if (!want_cm_) return;
    const V zero = broadcast<V>(R(0));
    for (int64_t ij = 0; ij < entries(); ++ij) top_sum_[ij] = bottom_sum_[ij] = zero;
  }

  void leave_strip() {
    if (want_cm_ && touched_) scatter();
  }

  // A segment: up to kMaxRows rows of a strip.
  void run(ClassField<R>& field, const Slab& slab, const LabelRun<R>* layers, const Sums& sums) {
    const int c = classes();
    totals_ = sums;
    layers_ = layers;
    field_ = &field;
    bool any_valid = false;
    for (int64_t l = 0; l < kind_->layers; ++l) any_valid = any_valid || layers[l].any_valid;
    if (!any_valid) {
      for (int64_t l = 0; l < kind_->layers; ++l) zero_maps(*problem_, *kind_, slab, l);
      return;
    }
    const Slope<R>& slope = g_->slopes[slab.segment];
    reports_ = kind_->transition == nullptr ? Reports::few_labels : Reports::one_row;
    for (int64_t l = 0; l < kind_->layers; ++l) {
      const bool coherent = kind_->transition == nullptr ? few_labels(slab, l) : layers[l].common >= 0;
      if (!coherent) reports_ = Reports::mixed;
    }
    if (reports_ == Reports::mixed) {
      for (int64_t l = 0; l < kind_->layers; ++l) {
        report_run(kind_->transition, c, layers[l].label, static_cast<int64_t>(slab.rows) * N,
                   reinterpret_cast<R*>(reported(l)), static_cast<int64_t>(kMaxRows) * N);
      }
    }
    const bool direct = !with_rows(slab.rows, [&](auto rows) { return columns<rows.value>(slope); });
    if (direct || !finish_segment(slab)) {
      log_space(slab, slope);
    } else if (want_cm_) {
      with_rows(slab.rows, [&](auto rows) { return gradients<rows.value>(slope); });
    }
    terms_.leave(sums);
    touched_ = true;
  }

 private:
  int classes() const { return problem_->classes; }
  int64_t entries() const { return static_cast<int64_t>(classes()) * classes(); }
  // (C, kMaxRows) of a layer
  V* reported(int64_t layer) const { return reported_ + layer * classes() * kMaxRows; }
  V* q(int64_t layer) const { return q_ + layer * classes() * kMaxRows; }
  V* drop(int64_t layer) const { return drop_ + layer * classes() * kMaxRows; }
  R report(int64_t layer, int i) const {  // Reports::one_row
    return kind_->transition[static_cast<int64_t>(i) * classes() + layers_[layer].common];
  }

  // The labels of a layer, and for each 1 where it is, in the place of `reported`. False where there are too many to be
  // worth it.
  bool few_labels(const Slab& slab, int64_t layer) {
    const LabelRun<R>& labels = layers_[layer];
    const int64_t n = static_cast<int64_t>(slab.rows) * N;
    int32_t* const found = few_ + layer * classes();
    int count = 0;
    if (labels.common >= 0) {
      found[count++] = labels.common;
    } else {
      const int most = classes() / 3;
      for (int64_t k = 0; k < n; ++k) {
        if (labels.valid[k] == R(0)) continue;
        int at = 0;
        while (at < count && found[at] != labels.label[k]) ++at;
        if (at < count) continue;
        if (count == most) return false;
        found[count++] = labels.label[k];
      }
    }
    few_count_[layer] = count;
    for (int at = 0; at < count; ++at) {
      R* const is = reinterpret_cast<R*>(reported(layer) + at * kMaxRows);
      for (int64_t k = 0; k < n; ++k) is[k] = labels.label[k] == found[at] ? labels.valid[k] : R(0);
    }
    return true;
  }

  template <int kRows>
  struct Rows {
    static constexpr int value = kRows;
  };
  template <class F>
  static COARSE_HD bool with_rows(int rows, const F& f) {
    switch (rows) {
      case 1: return f(Rows<1>{});
      case 2: return f(Rows<2>{});
      case 4: return f(Rows<4>{});
      default: return f(Rows<8>{});
    }
  }
  V valid(int64_t layer, int r) const { return load(layers_[layer].valid + r * N); }
  V weight(int64_t layer, int r) const { return load(layers_[layer].weight + r * N); }

  // --- grid rows -----------------------------------------------------------------------------------------------------

  void load_grid_row(int side, int64_t y) {
    const int64_t w = x_count_, points = kind_->field.points();
    const int64_t z0 = g_->z.i0[z_], z1 = g_->z.next(z_);
    const R lambda = g_->z.interpolated ? g_->z.lambda[z_] : R(0);
    const int64_t image = kind_->field.images == 1 ? 0 : image_ * kind_->field.image_stride;
    const auto offset = [&](int64_t plane, int64_t z) {
      return image + plane * points + (z * g_->y.grid + y) * g_->x.grid + x_first_;
    };
    for (int64_t plane = 0; plane < entries(); ++plane) {
      R* row = grid_[side] + plane * pitch_;
      load_run(kind_->field.data, kind_->field.storage, offset(plane, z0), w, row);
      if (lambda != R(0)) {
        load_run(kind_->field.data, kind_->field.storage, offset(plane, z1), w, deeper_);
        for (int64_t k = 0; k < w; ++k) row[k] = (R(1) - lambda) * row[k] + lambda * deeper_[k];
      }
      for (int64_t k = w; k < pitch_; ++k) row[k] = row[w - 1];
    }
    loaded_[side] = y;
  }

  const R* upper_row(int64_t ij) const { return grid_[0] + ij * pitch_; }
  const R* lower_row(int64_t ij) const { return (lower_ != cell_ ? grid_[1] : grid_[0]) + ij * pitch_; }

  V interpolate_x(const R* row) const {
    const R* const first = row + (columns_.node - x_first_);
    return columns_.read(load(first), load(first + N));
  }

  // Adds what top_sum_ and bottom_sum_ hold, lane by lane, to the grid points left and right of each lane.
  void scatter() {
    columns_.weigh(scatter_);
    if (lower_ == cell_) {  // both rows are one
      for (int64_t ij = 0; ij < entries(); ++ij) top_sum_[ij] += bottom_sum_[ij];
    }
    V w[N];
    for (int half = 0; half * N < columns_.nodes; ++half) {
      for (int k = 0; k < N; ++k) w[k] = scatter_[half * N + k];
      R* to_top = sums_.row(cell_, 0, columns_.node) + half * N;
      R* to_bottom = sums_.row(lower_, 0, columns_.node) + half * N;
      for (int64_t ij = 0; ij < entries(); ++ij, to_top += pitch_, to_bottom += pitch_) {
        const R* const top = reinterpret_cast<const R*>(top_sum_ + ij);
        const R* const bottom = reinterpret_cast<const R*>(bottom_sum_ + ij);
        if (lower_ == cell_) {
          give<R, 1>(w, {top}, {to_top});
        } else {
          give<R, 2>(w, {top, bottom}, {to_top, to_bottom});
        }
      }
    }
  }

  // --- a segment -----------------------------------------------------------------------------------------------------

  // Z, q and A[j,j] of every column and row. False where the logits change too much for geometric sequences.
  template <int kRows>
  bool columns(const Slope<R>& slope) {
    switch (reports_) {
      case Reports::mixed: return columns<kRows, Reports::mixed>(slope);
      case Reports::one_row: return columns<kRows, Reports::one_row>(slope);
      default: return columns<kRows, Reports::few_labels>(slope);
    }
  }

  template <int kRows, Reports kReports>
  bool columns(const Slope<R>& slope) {
    const int c = classes();
    const V zero = broadcast<V>(R(0)), limit = broadcast<V>(kMaxSpan<R>);
    const V lambda = broadcast<V>(slope.lambda0), step = broadcast<V>(slope.step);
    const R last = static_cast<R>(kRows - 1);
    I steep = zero != zero;
    for (int j = 0; j < c; ++j) {
      V top = broadcast<V>(-std::numeric_limits<R>::infinity());
      for (int i = 0; i < c; ++i) {
        const int64_t ij = static_cast<int64_t>(i) * c + j;
        const V a = interpolate_x(upper_row(ij)), b = interpolate_x(lower_row(ij));
        const V first = a + lambda * (b - a), slope_y = step * (b - a), end = first + last * slope_y;
        top = max_v(max_v(first, end), top);
        steep |= !((end - first <= limit) & (first - end <= limit));  // NaN is steep
        first_[ij] = first;
        ratio_[ij] = slope_y;
      }
      V z[kRows], q0[kRows];
      for (int r = 0; r < kRows; ++r) z[r] = q0[r] = zero;
      for (int i = 0; i < c; ++i) {
        const int64_t ij = static_cast<int64_t>(i) * c + j;
        V e = exp_v(first_[ij] - top);
        const V g = kRows > 1 ? exp_v(ratio_[ij]) : zero;
        first_[ij] = e;
        ratio_[ij] = g;
        const V row = kReports == Reports::one_row ? broadcast<V>(report(0, i)) : zero;
        for (int r = 0; r < kRows; ++r) {
          z[r] += e;
          if constexpr (kReports == Reports::mixed) q0[r] += e * reported_[i * kMaxRows + r];
          if constexpr (kReports == Reports::one_row) q0[r] += e * row;
          e *= g;
        }
      }
      for (int r = 0; r < kRows; ++r) inv_z_[j * kMaxRows + r] = R(1) / z[r];
      entry<kRows>(j, j, ajj_ + j * kMaxRows);
      if constexpr (kReports == Reports::few_labels) {
        for (int64_t l = 0; l < kind_->layers; ++l) at_labels<kRows>(j, l);
      } else {
        for (int r = 0; r < kRows; ++r) q_[j * kMaxRows + r] = q0[r] * inv_z_[j * kMaxRows + r];
        for (int64_t l = 1; l < kind_->layers; l += 2) {
          l + 1 < kind_->layers ? more_layers<kRows, 2, kReports>(j, l) : more_layers<kRows, 1, kReports>(j, l);
        }
      }
    }
    return !any(steep);
  }

  // q of column j where a layer has few labels.
  template <int kRows>
  void at_labels(int j, int64_t layer) {
    V* const to = q(layer) + j * kMaxRows;
    for (int r = 0; r < kRows; ++r) to[r] = broadcast<V>(R(0));
    for (int n = 0; n < few_count_[layer]; ++n) {
      const int64_t ij = static_cast<int64_t>(few_[layer * classes() + n]) * classes() + j;
      const V* const is = reported(layer) + n * kMaxRows;
      V e = first_[ij];
      for (int r = 0; r < kRows; ++r) {
        to[r] += e * is[r];
        e *= ratio_[ij];
      }
    }
    for (int r = 0; r < kRows; ++r) to[r] *= inv_z_[j * kMaxRows + r];
  }

  // A[i,j] of every row.
  template <int kRows>
  void entry(int i, int j, V* to) {
    const int64_t ij = static_cast<int64_t>(i) * classes() + j;
    V e = first_[ij];
    for (int r = 0; r < kRows; ++r) {
      to[r] = e * inv_z_[j * kMaxRows + r];
      e *= ratio_[ij];
    }
  }

  // q of the same column in kLayers further layers.
  template <int kRows, int kLayers, Reports kReports>
  void more_layers(int j, int64_t layer) {
    const int c = classes();
    V sum[kLayers][kRows];
    const V* rows[kLayers];
    for (int l = 0; l < kLayers; ++l) {
      rows[l] = reported(layer + l);
      for (int r = 0; r < kRows; ++r) sum[l][r] = broadcast<V>(R(0));
    }
    for (int i = 0; i < c; ++i) {
      const int64_t ij = static_cast<int64_t>(i) * c + j;
      V e = first_[ij];
      const V g = ratio_[ij];
      V row[kLayers];
      for (int l = 0; l < kLayers; ++l)
        row[l] = broadcast<V>(kReports == Reports::one_row ? report(layer + l, i) : R(0));
      for (int r = 0; r < kRows; ++r) {
        for (int l = 0; l < kLayers; ++l) {
          if constexpr (kReports == Reports::one_row) {
            sum[l][r] += e * row[l];
          } else {
            sum[l][r] += e * rows[l][i * kMaxRows + r];
          }
        }
        e *= g;
      }
    }
    for (int l = 0; l < kLayers; ++l)
      for (int r = 0; r < kRows; ++r) q(layer + l)[j * kMaxRows + r] = sum[l][r] * inv_z_[j * kMaxRows + r];
  }

  // Loss, posterior and gradient coefficients of every row and layer; false, and nothing added, where probabilities are
  // too small.
  bool finish_segment(const Slab& slab) {
    const int c = classes(), pitch = slab.pitch;
    const V zero = broadcast<V>(R(0)), one = broadcast<V>(R(1));
    const V smallest = broadcast<V>(kSmallestGeometricEvidence<R>);
    if (problem_->posterior != nullptr) {
      // of several kinds the product counts, so that every factor has to be exact
      for (int64_t l = 0; l < kind_->layers; ++l)
        for (int j = 0; j < c; ++j)
          for (int r = 0; r < slab.rows; ++r)
            if (any((valid(l, r) != zero) & ~(q(l)[j * kMaxRows + r] >= smallest))) return false;
      for (int64_t l = 0; l < kind_->layers; ++l)
        for (int j = 0; j < c; ++j)
          for (int r = 0; r < slab.rows; ++r)
            field_->joint[j * pitch + r] += select(valid(l, r) != zero, log_v(q(l)[j * kMaxRows + r]), zero);
      return true;
    }
    const auto evidence = [&](int64_t l, int r) {
      V d = zero;
      for (int j = 0; j < c; ++j) d += field_->p[j * pitch + r] * q(l)[j * kMaxRows + r];
      return select(valid(l, r) != zero, d, one);
    };
    for (int64_t l = 0; l < kind_->layers; ++l) {
      for (int r = 0; r < slab.rows; ++r) {
        const V d = evidence(l, r);
        if (any(!(d >= smallest))) return false;
        evidence_[r] = d;
      }
      if (kind_->layers == 1) break;
    }
    for (int64_t l = 0; l < kind_->layers; ++l) {
      if (kind_->layers > 1) {
        for (int r = 0; r < slab.rows; ++r) evidence_[r] = evidence(l, r);
      }
      if (totals_.transition != nullptr) add_transition_gradient(slab, l);
      for (int r = 0; r < slab.rows; ++r) {
        const V d = evidence_[r], inv_d = one / d;
        const V scaled = weight(l, r) * kind_->gradient_scale, scaled_trace = scaled * kind_->trace_weight;
        V trace = zero;
        for (int j = 0; j < c; ++j) {
          const int at = j * kMaxRows + r;
          const V p = field_->p[j * pitch + r], posterior = p * q(l)[at] * inv_d;
          const auto g = column_gradient(p, posterior, inv_d, inv_z_[at], ajj_[at], scaled, scaled_trace);
          drop(l)[at] = g.drop;
          if (l == 0) {
            keep_[at] = g.keep;
            diag_[at] = g.diag;
          } else {
            keep_[at] += g.keep;
            diag_[at] += g.diag;
          }
          trace += ajj_[at];
          field_->own[j * pitch + r] -= scaled * posterior;
        }
        field_->mass[r] += scaled;
        add(slab, l, r, -log_v(d), trace);
      }
    }
    return true;
  }

  void add(const Slab& slab, int64_t layer, int r, V nll, V trace) {
    const int64_t row = ((slab.image * kind_->layers + layer) * problem_->depth + z_) * problem_->height + slab.y0 + r;
    terms_.add(*kind_, row * problem_->width + slab.x0, lanes_, weight(layer, r), nll, trace);
  }

  // Sums over the rows of the gradient at the upper and the lower grid row, lane by lane.
  template <int kRows>
  bool gradients(const Slope<R>& slope) {
    const bool one_layer = kind_->layers == 1;
    switch (reports_) {
      case Reports::mixed:
        one_layer ? gradient<kRows, Reports::mixed, true>(slope) : gradient<kRows, Reports::mixed, false>(slope);
        break;
      case Reports::one_row:
        one_layer ? gradient<kRows, Reports::one_row, true>(slope) : gradient<kRows, Reports::one_row, false>(slope);
        break;
      default: gradient<kRows, Reports::few_labels, false>(slope);
    }
    return true;
  }

  template <int kRows, Reports kReports, bool kOneLayer>
  void gradient(const Slope<R>& slope) {
    const int c = classes();
    const V zero = broadcast<V>(R(0));
    for (int j = 0; j < c; ++j) {
      V keep[kRows], drop0[kRows];
      for (int r = 0; r < kRows; ++r) {
        keep[r] = keep_[j * kMaxRows + r];
        drop0[r] = drop_[j * kMaxRows + r];
      }
      for (int i = 0; i < c; ++i) {
        const int64_t ij = static_cast<int64_t>(i) * c + j;
        const V g = ratio_[ij];
        const V row = kReports == Reports::one_row ? broadcast<V>(report(0, i)) : zero;
        V value = zero, derivative = zero;  // of the polynomial sum_r v[r] g^r
        for (int r = kRows - 1; r >= 0; --r) {
          derivative = derivative * g + value;
          V v = keep[r];
          if constexpr (kReports == Reports::mixed) v -= drop0[r] * reported_[i * kMaxRows + r];
          if constexpr (kReports == Reports::one_row) v -= drop0[r] * row;
          if constexpr (!kOneLayer && kReports != Reports::few_labels) {
            for (int64_t l = 1; l < kind_->layers; ++l) {
              const V t = kReports == Reports::one_row ? broadcast<V>(report(l, i)) : reported(l)[i * kMaxRows + r];
              v -= drop(l)[j * kMaxRows + r] * t;
            }
          }
          value = value * g + v;
        }
        V sum = first_[ij] * value, sum_rows = first_[ij] * (g * derivative);
        if (i == j) {
          for (int r = 0; r < kRows; ++r) {
            sum += diag_[j * kMaxRows + r];
            sum_rows += static_cast<R>(r) * diag_[j * kMaxRows + r];
          }
        }
        add_sums(ij, slope, sum, sum_rows);
      }
      if constexpr (kReports == Reports::few_labels) {
        for (int64_t l = 0; l < kind_->layers; ++l) {
          for (int n = 0; n < few_count_[l]; ++n) {
            const int64_t ij = static_cast<int64_t>(few_[l * c + n]) * c + j;
            const V* const is = reported(l) + n * kMaxRows;
            V e = first_[ij], sum = zero, sum_rows = zero;
            for (int r = 0; r < kRows; ++r) {
              const V v = e * (drop(l)[j * kMaxRows + r] * is[r]);
              sum -= v;
              sum_rows -= static_cast<R>(r) * v;
              e *= ratio_[ij];
            }
            add_sums(ij, slope, sum, sum_rows);
          }
        }
      }
    }
  }

  void add_sums(int64_t ij, const Slope<R>& slope, V sum, V sum_rows) {
    const V lower = slope.lambda0 * sum + slope.step * sum_rows;
    bottom_sum_[ij] += lower;
    top_sum_[ij] += sum - lower;
  }

  // d loss / dT[i, y] -= weight / D * sum_j A[i,j] p[j]
  void add_transition_gradient(const Slab& slab, int64_t layer) {
    const int c = classes();
    double* const sum = totals_.transition;
    for (int i = 0; i < c; ++i) {
      V ap[kMaxRows];
      for (int r = 0; r < slab.rows; ++r) ap[r] = broadcast<V>(R(0));
      for (int j = 0; j < c; ++j) {
        V e = first_[static_cast<int64_t>(i) * c + j];
        const V g = ratio_[static_cast<int64_t>(i) * c + j];
        for (int r = 0; r < slab.rows; ++r) {
          ap[r] += e * (inv_z_[j * kMaxRows + r] * field_->p[j * slab.pitch + r]);
          e *= g;
        }
      }
      for (int r = 0; r < slab.rows; ++r) {
        const V share = ap[r] * (weight(layer, r) * kind_->gradient_scale) / evidence_[r];
        for (int k = 0; k < N; ++k) sum[i * c + layers_[layer].label[r * N + k]] -= static_cast<double>(share[k]);
      }
    }
  }

  void log_space(const Slab& slab, const Slope<R>& slope) {
    const int c = classes(), pitch = slab.pitch;
    const V zero = broadcast<V>(R(0));
    const bool want_reported = totals_.transition != nullptr;
    for (int r = 0; r < slab.rows; ++r) {
      const V lambda = broadcast<V>(slope.lambda0 + static_cast<R>(r) * slope.step);
      for (int64_t l = 0; l < kind_->layers; ++l) {
        for (int j = 0; j < c; ++j) slow_.s[j] = field_->s[j * pitch + r];
        for (int64_t ij = 0; ij < entries(); ++ij) {
          const V a = interpolate_x(upper_row(ij));
          const V x = g_->y.interpolated ? (R(1) - lambda) * a + lambda * interpolate_x(lower_row(ij)) : a;
          slow_.a[ij] = select(valid(l, r) != zero, x, zero);
        }
        const V scaled = weight(l, r) * kind_->gradient_scale, scaled_trace = scaled * kind_->trace_weight;
        const auto terms =
            slow_.run(c, kind_->transition, layers_[l].label + r * N, scaled, scaled_trace, want_reported);
        if (problem_->posterior != nullptr) {
          for (int j = 0; j < c; ++j)
            field_->joint[j * pitch + r] += select(valid(l, r) != zero, slow_.columns[j].log_q, zero);
          continue;
        }
        if (want_reported) slow_.add_reported(c, layers_[l].label + r * N, totals_.transition);
        add(slab, l, r, terms.nll, terms.trace);
        const V impossible = broadcast<V>(std::numeric_limits<R>::infinity());
        const V live = select(terms.nll == impossible, zero, scaled);
        field_->mass[r] += live;
        for (int j = 0; j < c; ++j) field_->own[j * pitch + r] -= select(live == zero, zero, live * slow_.r[j]);
        if (!want_cm_) continue;
        for (int64_t ij = 0; ij < entries(); ++ij) add_sums(ij, slope, slow_.a[ij], static_cast<R>(r) * slow_.a[ij]);
      }
    }
  }

  const Problem<R>* problem_ = nullptr;
  const Drawings<R>* kind_ = nullptr;
  const FieldPlan<R>* g_ = nullptr;
  bool want_cm_ = false, touched_ = false;
  int64_t pitch_ = 0, image_ = -1, z_ = -1;
  int64_t x_first_ = 0, x_count_ = 0;                    // of the chunk, points of a row
  int64_t cell_ = 0, lower_ = 0, loaded_[2] = {-1, -1};  // the band's upper and lower grid row, and those in grid_
  R* grid_[2];                                           // (C * C, pitch) logits of the two rows
  GradientRows<R> sums_;
  R* deeper_;  // one row of the next slice of the grid
  // the strip
  int64_t lanes_ = 0;  // pixels
  Columns<R> columns_;
  V *top_sum_, *bottom_sum_, *scatter_;  // (C * C) gradient at the upper and lower grid row, by lane
  // the segment
  const LabelRun<R>* layers_ = nullptr;
  ClassField<R>* field_ = nullptr;
  Terms<R> terms_;
  Sums totals_{};
  Reports reports_ = Reports::mixed;
  int32_t* few_;    // (layers, C) labels of each layer, and how many
  int* few_count_;  // (layers)
  V evidence_[kMaxRows];
  V *first_, *ratio_;                // (C * C) e0 and g
  V *reported_, *q_, *drop_;         // (layers, C, kMaxRows)
  V *inv_z_, *ajj_, *keep_, *diag_;  // (C, kMaxRows)
  LogSpace<R> slow_;
};

}  // namespace
}  // namespace coarse

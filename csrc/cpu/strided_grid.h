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
// which also takes care of the storage type and of the depth interpolation of volumes, and where the C x C entries of a
// point are neighbours: a strip reads a few points of all planes. Its gradients are summed in two such rows
// (GradientRows). Going down a chunk of the image, the lower row of a cell becomes the upper one of the next.
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
    pitch_ = round_up(c * c, N);
    tile_pitch_ = round_up(g_->span, N);
    want_cm_ = kind_->field.gradient != nullptr;
    for (R*& grid : grid_) grid = arena.take<R>(tile_pitch_ * pitch_);
    if (want_cm_) {
      sums_.init(kind_->field, *g_, c * c, c, plan.chunk_count, arena);
      sum_ = arena.take<V>(sums_.vectors());
    }
    tile_ = arena.take<R>(N * tile_pitch_);
    deeper_ = arena.take<R>(tile_pitch_);
    weights_ = arena.take<V>(2 * N);
    first_ = arena.take<V>(c * c);
    ratio_ = arena.take<V>(c * c);
    reported_ = arena.take<V>(layers * c * rows);
    q_ = arena.take<V>(layers * c * rows);
    drop_ = arena.take<V>(layers * c * rows);
    inv_z_ = arena.take<V>(c * rows);
    ajj_ = arena.take<V>(c * rows);
    keep_ = arena.take<V>(c * rows);
    diag_ = arena.take<V>(c * rows);
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
    columns_.weigh(weights_);
    touched_ = false;
    if (!want_cm_) return;
    upper_sum_ = sum_ + sums_.slot(cell_);
    lower_sum_ = sum_ + sums_.slot(lower_);
    for (int64_t ij = 0; ij < entries(); ++ij) upper_sum_[ij] = lower_sum_[ij] = broadcast<V>(R(0));
  }

  void leave_strip() {
    if (!want_cm_ || !touched_) return;
    const int64_t upper = sums_.slot(cell_), lower = sums_.slot(lower_);
    sums_.gather(columns_, sum_, upper < lower ? upper : lower, (upper < lower ? lower : upper) + entries());
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
  // Where [i, j] is in what has an entry for each of C x C: those of a column lie together, as they are worked on.
  int64_t at(int i, int j) const { return static_cast<int64_t>(j) * classes() + i; }
  int64_t plane_of(int64_t at) const { return at % classes() * classes() + at / classes(); }  // i * C + j
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

  template <class F>
  static COARSE_HD bool with_rows(int rows, const F& f) {
    switch (rows) {
      case 1: return f(Block<1>{});
      case 2: return f(Block<2>{});
      case 4: return f(Block<4>{});
      default: return f(Block<8>{});
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
    for (int64_t at = 0; at < entries(); at += N) {
      for (int64_t k = 0; k < N; ++k) {
        R* const row = tile_ + k * tile_pitch_;
        const int64_t plane = plane_of(at + k < entries() ? at + k : entries() - 1);
        load_run(kind_->field.data, kind_->field.storage, offset(plane, z0), w, row);
        if (lambda == R(0)) continue;
        load_run(kind_->field.data, kind_->field.storage, offset(plane, z1), w, deeper_);
        for (int64_t x = 0; x < w; ++x) row[x] = (R(1) - lambda) * row[x] + lambda * deeper_[x];
      }
      for (int64_t point = 0; point < w; point += N) {
        V x[N];
        for (int64_t k = 0; k < N; ++k) x[k] = load(tile_ + k * tile_pitch_ + point);
        transpose<R>(x);
        for (int64_t k = 0; k < N; ++k) store(grid_[side] + (point + k) * pitch_ + at, x[k]);
      }
    }
    loaded_[side] = y;
  }

  // At the strip's first point.
  const R* upper() const { return grid_[0] + (columns_.node - x_first_) * pitch_; }
  const R* lower() const { return (lower_ != cell_ ? grid_[1] : grid_[0]) + (columns_.node - x_first_) * pitch_; }

  // An entry, from its first point on; a point that a lane does not read may be infinite.
  V interpolate_x(const R* entry) const {
    V x = broadcast<V>(R(0));
    for (int n = 0; n < columns_.nodes; ++n)
      x += select(weights_[n] != V{}, weights_[n] * broadcast<V>(entry[n * pitch_]), V{});
    return x;
  }

  // --- geometric sequences -------------------------------------------------------------------------------------------
  //
  // By halves rather than term by term: a chain of kRows multiplications keeps instructions waiting that the scheduler
  // then has no room to look past.

  // to[r] = e g^r
  template <int kRows>
  COARSE_HD static void sequence(V e, V g, V* to) {
    to[0] = e;
    for (int half = 1; half < kRows; half *= 2, g *= g)
      for (int r = 0; r < half; ++r) to[half + r] = to[r] * g;
  }

  // sum_r v[stride r] x^r
  template <int kTerms>
  COARSE_HD static V polynomial(const V* v, int stride, V x) {
    if constexpr (kTerms == 1) {
      return v[0];
    } else {
      constexpr int half = kTerms / 2;
      V pairs[half];
      for (int k = 0; k < half; ++k) pairs[k] = v[2 * k * stride] + x * v[(2 * k + 1) * stride];
      return polynomial<half>(pairs, 1, x * x);
    }
  }

  struct Moments {
    V value, rows;  // sum_r v[r] g^r, sum_r r v[r] g^r
  };
  // With the pairs t[k] = v[2k] + g v[2k + 1], r being 2k or 2k + 1:
  // sum_r r v[r] g^r = 2 sum_k k t[k] g^2k + g sum_k v[2k + 1] g^2k.
  template <int kRows>
  COARSE_HD static Moments moments(const V* v, V g) {
    if constexpr (kRows == 1) {
      return {v[0], broadcast<V>(R(0))};
    } else {
      constexpr int half = kRows / 2;
      V pairs[half];
      for (int k = 0; k < half; ++k) pairs[k] = v[2 * k] + g * v[2 * k + 1];
      const Moments of_pairs = moments<half>(pairs, g * g);
      return {of_pairs.value, R(2) * of_pairs.rows + g * polynomial<half>(v + 1, 2, g * g)};
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
    const R last = static_cast<R>(kRows - 1);
    I steep = zero != zero;
    for (int j = 0; j < c; ++j) {
      V* const firsts = first_ + at(0, j);
      V* const ratios = ratio_ + at(0, j);
      const Extremes extreme = read_column(j, slope, last);
      const V top = extreme.first_or_last;
      V z[kRows], q0[kRows];
      for (int r = 0; r < kRows; ++r) z[r] = q0[r] = zero;
      in_blocks<kBlock / 2>(c, [&](auto block, int i) {
        constexpr int n = block.value;
        V eg[2 * n];
        for (int k = 0; k < n; ++k) eg[k] = firsts[i + k] - top;
        for (int k = 0; k < n; ++k) eg[n + k] = ratios[i + k];
        exp_each<kRows == 1 ? n : 2 * n>(eg);
        for (int k = 0; k < n; ++k) {
          const V g = kRows == 1 ? zero : eg[n + k];
          firsts[i + k] = eg[k];
          ratios[i + k] = g;
          const V row = kReports == Reports::one_row ? broadcast<V>(report(0, i + k)) : zero;
          V e[kRows];
          sequence<kRows>(eg[k], g, e);
          for (int r = 0; r < kRows; ++r) {
            z[r] += e[r];
            if constexpr (kReports == Reports::mixed) q0[r] += e[r] * reported_[(i + k) * kMaxRows + r];
            if constexpr (kReports == Reports::one_row) q0[r] += e[r] * row;
          }
        }
      });
      // NaN, which the extremes do not keep, stays in z
      steep |= !((last * extreme.most <= limit) & (last * extreme.least >= -limit) & (z[kRows - 1] == z[kRows - 1]));
      for (int r = 0; r < kRows; ++r) inv_z_[j * kMaxRows + r] = quick_inverse(z[r]);
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

  struct Extremes {
    V first_or_last, most, least;  // the largest logit, and slopes
  };
  // The logits of column j in the first row of a segment, and their slopes. Nearly always a strip has few points.
  Extremes read_column(int j, const Slope<R>& slope, R last) {
    switch (columns_.nodes) {
      case 1: return read_column<1>(j, slope, last);
      case 2: return read_column<2>(j, slope, last);
      case 3: return read_column<3>(j, slope, last);
      case 4: return read_column<4>(j, slope, last);
      default: return read_column<0>(j, slope, last);
    }
  }

  // A point that a lane does not read has the weight 0, and makes NaN of it if it is infinite: then `columns` fails.
  template <int kNodes>
  Extremes read_column(int j, const Slope<R>& slope, R last) {
    const int c = classes(), nodes = kNodes > 0 ? kNodes : columns_.nodes;
    const int64_t pitch = pitch_;
    const V lambda = broadcast<V>(slope.lambda0), step = broadcast<V>(slope.step);
    V weights[kNodes > 0 ? kNodes : 2 * N];
    for (int n = 0; n < nodes; ++n) weights[n] = weights_[n];
    const R *const upper_row = upper() + at(0, j), *const lower_row = lower() + at(0, j);
    V* const firsts = first_ + at(0, j);
    V* const slopes = ratio_ + at(0, j);
    V top = broadcast<V>(-std::numeric_limits<R>::infinity()), most = broadcast<V>(R(0)), least = most;
    in_blocks<kBlock>(c, [&](auto block, int i) {
      constexpr int count = block.value;
      V a[count], b[count];
      for (int k = 0; k < count; ++k) {
        a[k] = weights[0] * upper_row[i + k];
        b[k] = weights[0] * lower_row[i + k];
      }
      for (int n = 1; n < nodes; ++n) {
        for (int k = 0; k < count; ++k) {
          a[k] += weights[n] * upper_row[n * pitch + i + k];
          b[k] += weights[n] * lower_row[n * pitch + i + k];
        }
      }
      for (int k = 0; k < count; ++k) {
        const V first = a[k] + lambda * (b[k] - a[k]), slope_y = step * (b[k] - a[k]);
        top = max_v(max_v(first, first + last * slope_y), top);
        most = max_v(slope_y, most);
        least = min_v(slope_y, least);
        firsts[i + k] = first;
        slopes[i + k] = slope_y;
      }
    });
    return {top, most, least};
  }

  // q of column j where a layer has few labels.
  template <int kRows>
  void at_labels(int j, int64_t layer) {
    V* const to = q(layer) + j * kMaxRows;
    for (int r = 0; r < kRows; ++r) to[r] = broadcast<V>(R(0));
    for (int n = 0; n < few_count_[layer]; ++n) {
      const int64_t ij = at(few_[layer * classes() + n], j);
      const V* const is = reported(layer) + n * kMaxRows;
      V e[kRows];
      sequence<kRows>(first_[ij], ratio_[ij], e);
      for (int r = 0; r < kRows; ++r) to[r] += e[r] * is[r];
    }
    for (int r = 0; r < kRows; ++r) to[r] *= inv_z_[j * kMaxRows + r];
  }

  // A[i,j] of every row.
  template <int kRows>
  void entry(int i, int j, V* to) {
    V e[kRows];
    sequence<kRows>(first_[at(i, j)], ratio_[at(i, j)], e);
    for (int r = 0; r < kRows; ++r) to[r] = e[r] * inv_z_[j * kMaxRows + r];
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
      const int64_t ij = at(i, j);
      V e[kRows];
      sequence<kRows>(first_[ij], ratio_[ij], e);
      V row[kLayers];
      for (int l = 0; l < kLayers; ++l)
        row[l] = broadcast<V>(kReports == Reports::one_row ? report(layer + l, i) : R(0));
      for (int r = 0; r < kRows; ++r) {
        for (int l = 0; l < kLayers; ++l) {
          if constexpr (kReports == Reports::one_row) {
            sum[l][r] += e[r] * row[l];
          } else {
            sum[l][r] += e[r] * rows[l][i * kMaxRows + r];
          }
        }
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
    const auto find = [&](int64_t l) {
      return with_rows(slab.rows, [&](auto rows) { return find_evidence<rows.value>(slab, l); });
    };
    for (int64_t l = kind_->layers - 1; l >= 0; --l)  // the first layer's stays
      if (!find(l)) return false;
    for (int64_t l = 0; l < kind_->layers; ++l) {
      if (l > 0) find(l);
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

  // D of every row; 1 where there is no label. False where one is too small.
  template <int kRows>
  bool find_evidence(const Slab& slab, int64_t layer) {
    const V* const qs = q(layer);
    const V* const p = field_->p;
    V d[kRows] = {};
    for (int j = 0; j < classes(); ++j)
      for (int r = 0; r < kRows; ++r) d[r] += p[j * slab.pitch + r] * qs[j * kMaxRows + r];
    bool enough = true;
    for (int r = 0; r < kRows; ++r) {
      evidence_[r] = select(valid(layer, r) != V{}, d[r], broadcast<V>(R(1)));
      enough = enough && !any(!(evidence_[r] >= kSmallestGeometricEvidence<R>));
    }
    return enough;
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
        const int64_t ij = at(i, j);
        const V g = ratio_[ij];
        const V row = kReports == Reports::one_row ? broadcast<V>(report(0, i)) : zero;
        V v[kRows];
        for (int r = 0; r < kRows; ++r) {
          v[r] = keep[r];
          if constexpr (kReports == Reports::mixed) v[r] -= drop0[r] * reported_[i * kMaxRows + r];
          if constexpr (kReports == Reports::one_row) v[r] -= drop0[r] * row;
          if constexpr (!kOneLayer && kReports != Reports::few_labels) {
            for (int64_t l = 1; l < kind_->layers; ++l) {
              const V t = kReports == Reports::one_row ? broadcast<V>(report(l, i)) : reported(l)[i * kMaxRows + r];
              v[r] -= drop(l)[j * kMaxRows + r] * t;
            }
          }
        }
        const Moments m = moments<kRows>(v, g);
        V sum = first_[ij] * m.value, sum_rows = first_[ij] * m.rows;
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
            const int64_t ij = at(few_[l * c + n], j);
            const V* const is = reported(l) + n * kMaxRows;
            V v[kRows];
            for (int r = 0; r < kRows; ++r) v[r] = drop(l)[j * kMaxRows + r] * is[r];
            const Moments m = moments<kRows>(v, ratio_[ij]);
            add_sums(ij, slope, -first_[ij] * m.value, -first_[ij] * m.rows);
          }
        }
      }
    }
  }

  void add_sums(int64_t ij, const Slope<R>& slope, V sum, V sum_rows) {
    const V lower = slope.lambda0 * sum + slope.step * sum_rows;
    lower_sum_[ij] += lower;
    upper_sum_[ij] += sum - lower;
  }

  // d loss / dT[i, y] -= weight / D * sum_j A[i,j] p[j]
  void add_transition_gradient(const Slab& slab, int64_t layer) {
    const int c = classes();
    double* const sum = totals_.transition;
    for (int i = 0; i < c; ++i) {
      V ap[kMaxRows];
      for (int r = 0; r < slab.rows; ++r) ap[r] = broadcast<V>(R(0));
      for (int j = 0; j < c; ++j) {
        V e = first_[at(i, j)];
        const V g = ratio_[at(i, j)];
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
        for (int64_t at = 0; at < entries(); ++at) {
          const V a = interpolate_x(upper() + at);
          const V x = g_->y.interpolated ? (R(1) - lambda) * a + lambda * interpolate_x(lower() + at) : a;
          slow_.a[plane_of(at)] = select(valid(l, r) != zero, x, zero);
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
        for (int64_t at = 0; at < entries(); ++at)
          add_sums(at, slope, slow_.a[plane_of(at)], static_cast<R>(r) * slow_.a[plane_of(at)]);
      }
    }
  }

  const Problem<R>* problem_ = nullptr;
  const Drawings<R>* kind_ = nullptr;
  const FieldPlan<R>* g_ = nullptr;
  bool want_cm_ = false, touched_ = false;
  int64_t pitch_ = 0, tile_pitch_ = 0, image_ = -1, z_ = -1;
  int64_t x_first_ = 0, x_count_ = 0;                    // of the chunk, points of a row
  int64_t cell_ = 0, lower_ = 0, loaded_[2] = {-1, -1};  // the band's upper and lower grid row, and those in grid_
  R* grid_[2];                                           // (points, C * C) logits of the two rows
  R *tile_, *deeper_;                                    // (N, points) planes on their way in; one of the next slice
  GradientRows<R> sums_;
  // the strip
  int64_t lanes_ = 0;  // pixels
  Columns<R> columns_;
  V* weights_;                        // (2 N) what lanes take of a point
  V *sum_, *upper_sum_, *lower_sum_;  // (C * C) gradient at the two grid rows, by lane, as `sums_` wants it
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

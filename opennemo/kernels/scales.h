// Scales, minima and codes of blocks of weights: those that lose least.
//
// What is searched for and how is defined in model/block_scales.py; this computes the same for 16
// groups at a time, one in each lane, so that sums over a group need no shuffles. Only the order of
// additions differs, which rarely decides between two candidates of equal loss.

constexpr int SIDE_BY_SIDE = 16;  // groups: one block of 256 weights in groups of 16, or two in groups of 32
constexpr int MOST_WEIGHTS = 32;  // of a group
constexpr float TINY = 1e-30f;

struct Grid {  // mirrored in cpu.py
  int32_t n, n_groups;  // weights of a group; groups of a block, 0 if their scales are floats
  int32_t has_min, free_min, n_values, n_starts, n_alternations;
  float low, high, least, most;  // the values of codes, and the limits of groups' scales
  float values[16], starts[16];
};

struct Fitted {  // where the results go
  uint8_t* codes;
  float *unit, *min_unit, *units, *min_units;
};

static inline vf nearest_whole(vf x) {
  const vf magic = splat(12582912.f);  // halves go to even, as torch.round does
  return (x + magic) - magic;
}
static inline vf chosen(vi mask, vf a, vf b) { return mask ? a : b; }

// The nearest number that float16 has, in float32.
static inline vf nearest_half(vf x) {
  x = smaller(larger(x, splat(-65504.f)), splat(65504.f));
  vi bits = (vi)x;
  vf normal = (vf)((bits + 0xFFF + (bits >> 13 & 1)) & (int32_t)0xFFFFE000);
  vf magic = splat(0.75f);  // float32 there has steps of 2^-24, as float16 has below 2^-14
  vf tiny = (x + magic) - magic;
  return chosen(magnitude(x) < splat(0x1p-14f), tiny, normal);
}

// 16 groups of weights, in NV vectors a row.
class Groups {
 public:
  explicit Groups(const Grid& grid) : grid(grid) {}

  // x and importance (groups, n), of which the last is repeated where there are fewer than 16.
  void fit(const float* x, const float* importance, int count, size_t first, Fitted to) {
    for (int k = 0; k < grid.n; k++)
      for (int j = 0; j < SIDE_BY_SIDE; j++) {
        size_t at = (size_t)std::min(j, count - 1) * grid.n + k;
        x_[k][j] = x[at], w_[k][j] = importance[at], wx_[k][j] = x[at] * importance[at];
      }
    for (int v = 0; v < NV; v++) search(v);
    if (grid.n_groups) in_units();
    else as_floats();
    const int blocks = grid.n_groups ? count / grid.n_groups : count;
    const int per_block = grid.n_groups ? grid.n_groups : 1;
    for (int j = 0; j < count; j++)
      for (int k = 0; k < grid.n; k++) to.codes[(first + j) * grid.n + k] = (uint8_t)codes_[k][j];
    for (int b = 0; b < blocks; b++) {
      to.unit[first / per_block + b] = unit_[b];
      if (grid.has_min) to.min_unit[first / per_block + b] = min_unit_[b];
    }
    for (int j = 0; j < count && grid.n_groups; j++) {
      to.units[first + j] = units_[j];
      if (grid.has_min) to.min_units[first + j] = min_units_[j];
    }
  }

 private:
  static constexpr int NV = SIDE_BY_SIDE / W;
  typedef float Row[SIDE_BY_SIDE];

  vf nearest(vf x) const {
    if (!grid.n_values) return smaller(larger(nearest_whole(x), splat(grid.low)), splat(grid.high));
    vf value = splat(grid.values[0]);
    for (int i = 1; i < grid.n_values; i++)
      value = chosen(2.f * x >= splat(grid.values[i - 1] + grid.values[i]), splat(grid.values[i]), value);
    return value;
  }
  vf code(vf value) const {
    if (!grid.n_values) return value - splat(grid.low);
    vf lower = {};
    for (int i = 0; i < grid.n_values; i++) lower += chosen(value > splat(grid.values[i]), splat(1.f), vf{});
    return lower;
  }
  static vf inverse(vf scale) { return chosen(scale == vf{}, vf{}, 1.f / scale); }
  vf values_of(int k, int v, vf low, vf inverse) const { return nearest((load(x_[k] + v * W) - low) * inverse); }

  // Floats that are groups' scales and lows, without limits on what they may be.
  void search(int v) {
    const int n = grid.n;
    vf total = {}, first = {}, least = load(x_[0] + v * W), most = least, extreme = {};
    for (int k = 0; k < n; k++) {
      vf x = load(x_[k] + v * W);
      total += load(w_[k] + v * W), first += load(wx_[k] + v * W);
      least = smaller(x, least), most = larger(x, most);
      extreme = chosen(magnitude(x) > magnitude(extreme), x, extreme);
    }
    if (!grid.free_min) least = smaller(least, vf{});
    const vf begin = grid.has_min ? least : vf{};
    const vf widest = grid.has_min ? (most - least) / splat(grid.high) : extreme / splat(grid.low);
    vf best_gain = splat(-1.f), best_scale = {}, best_low = {};
    auto improve = [&](vf scale, vf low) {
      vf xv = {}, vv = {}, wv = {}, by = inverse(scale);
      for (int k = 0; k < n; k++) {
        vf value = values_of(k, v, low, by), weighted = load(w_[k] + v * W) * value;
        xv += load(wx_[k] + v * W) * value, vv += weighted * value, wv += weighted;
      }
      const vf through_zero = xv / larger(vv, splat(TINY));
      vf gain;
      if (grid.has_min) {
        vf determinant = total * vv - wv * wv;
        vi flat = determinant <= 1e-6f * total * vv;
        scale = chosen(flat, vf{}, (total * xv - wv * first) / chosen(flat, splat(1.f), determinant));
        low = (first - scale * wv) / total;
        if (!grid.free_min) {
          vi above = low > vf{};
          scale = chosen(above, through_zero, scale), low = chosen(above, vf{}, low);
        }
        gain = scale * xv + low * first;
      } else {
        scale = through_zero, low = vf{}, gain = scale * xv;
      }
      vi better = gain > best_gain;
      best_gain = chosen(better, gain, best_gain);
      best_scale = chosen(better, scale, best_scale), best_low = chosen(better, low, best_low);
    };
    for (int i = 0; i < grid.n_starts; i++) improve(widest * grid.starts[i], begin);
    for (int i = 0; i < grid.n_alternations; i++) improve(best_scale, best_low);
    store(scale_ + v * W, best_scale), store(low_ + v * W, best_low);
    store(total_ + v * W, total), store(first_ + v * W, first);
  }

  void as_floats() {
    for (int v = 0; v < NV; v++) {
      vf unit = nearest_half(load(scale_ + v * W)), min_unit = nearest_half(-load(low_ + v * W));
      vf low = grid.has_min ? -min_unit : vf{}, by = inverse(unit);
      for (int k = 0; k < grid.n; k++) store(codes_[k] + v * W, code(values_of(k, v, low, by)));
      store(unit_ + v * W, unit), store(min_unit_ + v * W, min_unit);
    }
  }

  static float half(float x) { return nearest_half(splat(x))[0]; }
  float whole(float x, float unit) const {
    float ratio = unit ? x * (1 / unit) : 0;
    return std::min(std::max(std::nearbyint(ratio), grid.least), grid.most);
  }

  // Scales and lows as whole numbers of units that the groups of a block share.
  void in_units() {
    const int per_block = grid.n_groups, n_blocks = SIDE_BY_SIDE / per_block;
    Row unit, min_unit, units, min_units, wv, vv, xv, loss;
    float best_loss[SIDE_BY_SIDE];
    for (int b = 0; b < n_blocks; b++) {
      float extreme = 0, deepest = 0;
      for (int j = b * per_block; j < (b + 1) * per_block; j++) {
        bool more = grid.least < 0 ? std::fabs(scale_[j]) > std::fabs(extreme) : scale_[j] > extreme;
        if (more) extreme = scale_[j];
        deepest = std::max(deepest, -low_[j]);
      }
      unit[b] = half(extreme / (grid.least < 0 ? grid.least : grid.most));
      min_unit[b] = half(deepest / grid.most);
      for (int j = b * per_block; j < (b + 1) * per_block; j++)
        units[j] = whole(scale_[j], unit[b]), min_units[j] = whole(-low_[j], min_unit[b]);
    }
    for (int round = 0; round <= grid.n_alternations; round++) {
      for (int j = 0; j < SIDE_BY_SIDE; j++) {
        scale_[j] = unit[j / per_block] * units[j];
        low_[j] = grid.has_min ? -min_unit[j / per_block] * min_units[j] : 0;
      }
      for (int v = 0; v < NV; v++) products(v, wv, vv, xv, loss);
      Row better;
      for (int b = 0; b < n_blocks; b++) {
        float sum = 0;
        for (int j = b * per_block; j < (b + 1) * per_block; j++) sum += loss[j];
        const bool keep = round == 0 || sum < best_loss[b];
        if (keep) best_loss[b] = sum, unit_[b] = unit[b], min_unit_[b] = min_unit[b];
        for (int j = b * per_block; j < (b + 1) * per_block; j++) {
          better[j] = keep;
          if (keep) units_[j] = units[j], min_units_[j] = min_units[j];
        }
      }
      for (int v = 0; v < NV; v++) {
        vi mask = load(better + v * W) > vf{};
        for (int k = 0; k < grid.n; k++)
          store(codes_[k] + v * W, chosen(mask, load(values_[k] + v * W), load(codes_[k] + v * W)));
      }
      for (int b = 0; b < n_blocks; b++) {
        double uu = 0, uv = 0, mm = 0, ux = 0, mx = 0;
        for (int j = b * per_block; j < (b + 1) * per_block; j++) {
          if (grid.has_min) {
            min_units[j] = whole(-(first_[j] - scale_[j] * wv[j]) / total_[j], min_unit[b]);
            low_[j] = -min_unit[b] * min_units[j];
          }
          units[j] = whole((xv[j] - low_[j] * wv[j]) / std::max(vv[j], TINY), unit[b]);
          const double u = units[j], m = grid.has_min ? -min_units[j] : 0;
          uu += u * u * vv[j], uv += u * m * wv[j], mm += m * m * total_[j];
          ux += u * xv[j], mx += m * first_[j];
        }
        const double determinant = uu * mm - uv * uv;
        const bool flat = !grid.has_min || determinant <= 1e-6 * uu * mm;
        unit[b] = half(flat ? ux / std::max(uu, (double)TINY) : (ux * mm - uv * mx) / determinant);
        min_unit[b] = flat ? 0 : half(std::max(0.0, (mx * uu - uv * ux) / determinant));
      }
    }
    for (int v = 0; v < NV; v++)
      for (int k = 0; k < grid.n; k++) store(codes_[k] + v * W, code(load(codes_[k] + v * W)));
  }

  // Values for the scales and lows as they are, and sums of their products.
  void products(int v, Row& wv, Row& vv, Row& xv, Row& loss) {
    const vf scale = load(scale_ + v * W), low = load(low_ + v * W), by = inverse(scale);
    vf sums[4] = {};
    for (int k = 0; k < grid.n; k++) {
      vf value = values_of(k, v, low, by), weighted = load(w_[k] + v * W) * value;
      vf error = load(x_[k] + v * W) - scale * value - low;
      sums[0] += weighted, sums[1] += weighted * value, sums[2] += load(wx_[k] + v * W) * value;
      sums[3] += load(w_[k] + v * W) * error * error;
      store(values_[k] + v * W, value);
    }
    Row* rows[] = {&wv, &vv, &xv, &loss};
    for (int i = 0; i < 4; i++) store(*rows[i] + v * W, sums[i]);
  }

  const Grid grid;
  alignas(64) Row x_[MOST_WEIGHTS], w_[MOST_WEIGHTS], wx_[MOST_WEIGHTS];
  alignas(64) Row values_[MOST_WEIGHTS], codes_[MOST_WEIGHTS];
  alignas(64) Row scale_, low_, total_, first_, unit_, min_unit_, units_, min_units_;
};

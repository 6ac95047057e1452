// The lean decoder (llm/decoder.py) as one call: of a small model's step the way back to Python between
// two dozen operators is a third. It calls the very operators that the decoder calls, in their order. As a draft model it also writes
// ahead, a token after another, before it returns.
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/embedding.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/custom_class.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

namespace {

using at::Tensor;
using Some = std::optional<Tensor>;

template <typename Signature> auto find(const char* name) { return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>(); }

struct Operators {
    using Linear = Tensor(const Tensor&, const Tensor&, const Some&, int64_t, int64_t);
    using LinearInt8 = Tensor(const Tensor&, const Tensor&, const Tensor&, const Some&, int64_t, int64_t);
    using AddLowRank = void(Tensor, const Tensor&, at::TensorList, const Tensor&, const Tensor&, const Tensor&);
    using GatePanels = Tensor(const Tensor&, int64_t, int64_t);
    using AddNorm = Tensor(Tensor, const Some&, const Tensor&, double, double, bool);
    using RopeStore = void(Tensor, const Tensor&, const Tensor&, const Some&, const Some&, Tensor, Tensor, const Some&, const Some&, int64_t, double, bool);
    using Attend = Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, double, int64_t, double, const Some&,
                          std::optional<bool>, bool);
    c10::TypedOperatorHandle<Linear> linear = find<Linear>("fairlead::linear");
    c10::TypedOperatorHandle<LinearInt8> linear_int8 = find<LinearInt8>("fairlead::linear_int8");
    c10::TypedOperatorHandle<AddLowRank> add_low_rank = find<AddLowRank>("fairlead::add_low_rank");
    c10::TypedOperatorHandle<GatePanels> gate_panels = find<GatePanels>("fairlead::gate_panels");
    c10::TypedOperatorHandle<AddNorm> add_norm = find<AddNorm>("fairlead::add_norm");
    c10::TypedOperatorHandle<RopeStore> rope_store = find<RopeStore>("fairlead::rope_store");
    c10::TypedOperatorHandle<Attend> attend = find<Attend>("fairlead::attend");
};

// packed, scales of int8, bias, num_columns, gate: as PackedLinear has them
using Packed = std::tuple<Tensor, Some, Some, int64_t, int64_t>;
// scale, window, softcap, sinks
using Attends = std::tuple<double, int64_t, double, Some>;
// attention_norm, qkv, q_norm, k_norm, rotates, how it attends, out, mlp_norm, gate_up, down
using Layer = std::tuple<Tensor, Packed, Some, Some, bool, Attends, Packed, Tensor, Packed, Packed>;
// arenas, places of each site (none where no adapter adds), then tiles and rows: of all, and of those whose logits are wanted
using Laid = std::tuple<std::vector<Tensor>, std::vector<Tensor>, Tensor, Tensor, Tensor, Tensor>;
constexpr int64_t LANES = 16;  // columns of a panel
constexpr size_t SITES = 4;  // of a layer: qkv, out, gate_up, down
// of embedding and residual, and the divisor of logits
using Multipliers = std::tuple<double, double, double>;

template <typename T> int64_t likeliest(const T* logits, int64_t size) {
    float best = (float)logits[0];
    for (int64_t i = 1; i < size; i++) best = std::max(best, (float)logits[i]);
    for (int64_t i = 0; i < size; i++)
        if ((float)logits[i] == best) return i;
    return 0;  // NaN
}

class Decoder : public torch::CustomClassHolder {
  public:
    Decoder(Tensor embedding, std::vector<Layer> layers, Tensor norm, Packed head, Tensor cos, Tensor sin, int64_t num_heads, double eps, const Multipliers& multipliers,
            bool fixed)
        : embedding_(std::move(embedding)), layers_(std::move(layers)), norm_(std::move(norm)), head_(std::move(head)), cos_(std::move(cos)), sin_(std::move(sin)),
          num_heads_(num_heads), eps_(eps), embedding_multiplier_(std::get<0>(multipliers)), residual_multiplier_(std::get<1>(multipliers)),
          logits_divisor_(std::get<2>(multipliers)), fixed_(fixed) {}

    // As LeanDecoder._norm_before: logits [N, V] of the rows `logit_rows`; none: of all.
    Tensor decode(const Tensor& ids, const Tensor& positions, const Tensor& slots, const Tensor& starts, const Tensor& lens, const Tensor& tables, const Some& logit_rows,
                  const std::vector<Tensor>& keys, const std::vector<Tensor>& values, const std::optional<Laid>& laid) const {
        TORCH_CHECK(keys.size() == layers_.size() && values.size() == layers_.size(), "decode: a cache of each layer");
        TORCH_CHECK(!laid || std::get<1>(*laid).size() == SITES * layers_.size(), "decode: places of each site");
        Tensor x = at::embedding(embedding_, ids);
        if (embedding_multiplier_ != 1) x.mul_(embedding_multiplier_);
        Some y;
        for (size_t i = 0; i < layers_.size(); i++) {
            const auto& [attention_norm, qkv, q_norm, k_norm, rotates, attends, out, mlp_norm, gate_up, down] = layers_[i];
            const auto& [scale, window, softcap, sinks] = attends;
            const Tensor projected = multiply(operators_.add_norm.call(x, y, attention_norm, eps_, residual_multiplier_, true), qkv, laid, SITES * i);
            const Some cos = rotates ? Some(cos_) : Some(), sin = rotates ? Some(sin_) : Some();
            operators_.rope_store.call(projected, positions, slots, cos, sin, keys[i], values[i], q_norm, k_norm, num_heads_, eps_, true);
            const Tensor q = projected.view({projected.size(0), -1, keys[i].size(3)}).narrow(1, 0, num_heads_);
            Tensor a = operators_.attend.call(q, keys[i], values[i], starts, lens, tables, scale, window, softcap, sinks, std::nullopt, fixed_).flatten(1);
            const bool last = logit_rows && i + 1 == layers_.size();
            if (last && !(x.size(0) == 1 && logit_rows->size(0) == 1)) {
                x = x.index_select(0, *logit_rows);
                a = a.index_select(0, *logit_rows);
            }
            const Tensor h = operators_.add_norm.call(x, multiply(a, out, laid, SITES * i + 1, last), mlp_norm, eps_, residual_multiplier_, true);
            y = multiply(multiply(h, gate_up, laid, SITES * i + 2, last), down, laid, SITES * i + 3, last);
        }
        Tensor logits = multiply(operators_.add_norm.call(x, y, norm_, eps_, residual_multiplier_, true), head_);
        return logits_divisor_ == 1 ? logits : logits.div_(logits_divisor_);
    }

    // The likeliest tokens among the first `num_ids` of the vocabulary, one after another: ids [1 + P, N]. The first ones are those of
    // `logits`; then, for each place p, the first `nums[p]` sequences get one that follows, the last known token of which stood at
    // `positions` - 1 before. What is not computed is 0.
    Tensor write_ahead(const Tensor& logits, const Tensor& positions, const Tensor& tables, const std::vector<int64_t>& nums, int64_t num_ids,
                       const std::vector<Tensor>& keys, const std::vector<Tensor>& values) const {
        const int64_t num = logits.size(0), num_places = (int64_t)nums.size();
        TORCH_CHECK(positions.numel() == num && positions.is_contiguous() && positions.scalar_type() == at::kLong, "write_ahead: positions int64 [N]");
        TORCH_CHECK(tables.dim() == 2 && tables.size(0) == num && tables.stride(1) == 1 && tables.scalar_type() == at::kInt, "write_ahead: tables int32 [N, B]");
        TORCH_CHECK(num_ids > 0 && num_ids <= logits.size(1), "write_ahead: ids of the vocabulary");
        const int64_t block_size = keys.at(0).size(2), *first = positions.const_data_ptr<int64_t>();
        const int32_t* table = tables.const_data_ptr<int32_t>();
        Tensor ids = at::zeros({1 + num_places, num}, positions.options());
        Tensor places = at::empty({num}, positions.options()), slots = at::empty({num}, positions.options()), lens = at::empty({num}, tables.options());
        const Tensor starts = at::arange(num + 1, tables.options());
        choose(logits, num_ids, ids.mutable_data_ptr<int64_t>());
        for (int64_t p = 0; p < num_places; p++) {
            const int64_t n = nums[p];
            TORCH_CHECK(n > 0 && n <= num, "write_ahead: ", n, " of ", num, " sequences");
            for (int64_t s = 0; s < n; s++) {
                const int64_t position = first[s] + p, block = position / block_size;
                TORCH_CHECK(position >= 0 && block < tables.size(1), "write_ahead: position ", position, " has no block");
                places.mutable_data_ptr<int64_t>()[s] = position;
                slots.mutable_data_ptr<int64_t>()[s] = table[s * tables.stride(0) + block] * block_size + position % block_size;
                lens.mutable_data_ptr<int32_t>()[s] = (int32_t)position + 1;
            }
            const auto some = [n](const Tensor& x) { return x.narrow(0, 0, n); };
            choose(decode(some(ids[p]), some(places), some(slots), starts.narrow(0, 0, n + 1), some(lens), some(tables), {}, keys, values, {}), num_ids,
                   ids.mutable_data_ptr<int64_t>() + (p + 1) * num);
        }
        return ids;
    }

  private:
    Tensor multiply(const Tensor& x, const Packed& weights) const {
        const auto& [packed, scales, bias, num_columns, gate] = weights;
        return scales ? operators_.linear_int8.call(x, packed, *scales, bias, num_columns, gate) : operators_.linear.call(x, packed, bias, num_columns, gate);
    }

    // With what adapters add at the site; `last`: to rows whose logits are wanted.
    Tensor multiply(const Tensor& x, const Packed& weights, const std::optional<Laid>& laid, size_t site, bool last = false) const {
        if (!laid || !std::get<1>(*laid)[site].numel()) return multiply(x, weights);
        const auto& [arenas, places, tiles, rows, wanted_tiles, wanted_rows] = *laid;
        const auto& [packed, scales, bias, num_columns, gate] = weights;
        const auto add = [&](const Tensor& y) { operators_.add_low_rank.call(y, x, arenas, places[site], last ? wanted_tiles : tiles, last ? wanted_rows : rows); };
        if (!gate) {
            Tensor y = multiply(x, weights);
            add(y);
            return y;
        }
        const Tensor both = multiply(x, Packed(packed, scales, bias, packed.size(0) * LANES, 0));
        add(both);
        return operators_.gate_panels.call(both, num_columns, gate);
    }

    static void choose(const Tensor& logits, int64_t num_ids, int64_t* to) {
        const int64_t size = logits.size(1);
        for (int64_t n = 0; n < logits.size(0); n++)
            to[n] = logits.scalar_type() == at::kFloat ? likeliest(logits.const_data_ptr<float>() + n * size, num_ids)
                                                       : likeliest(logits.const_data_ptr<at::BFloat16>() + n * size, num_ids);
    }

    const Operators operators_;
    const Tensor embedding_;
    const std::vector<Layer> layers_;
    const Tensor norm_;
    const Packed head_;
    const Tensor cos_, sin_;
    const int64_t num_heads_;
    const double eps_, embedding_multiplier_, residual_multiplier_, logits_divisor_;
    const bool fixed_;
};

}  // namespace

TORCH_LIBRARY_FRAGMENT(fairlead, m) {
    m.class_<Decoder>("Decoder")
        .def(torch::init<Tensor, std::vector<Layer>, Tensor, Packed, Tensor, Tensor, int64_t, double, const Multipliers&, bool>())
        .def("decode", &Decoder::decode)
        .def("write_ahead", &Decoder::write_ahead);
}

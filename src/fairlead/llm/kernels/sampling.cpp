// The likeliest token of each row of logits, of those that a grammar's mask allows. Float32 and bfloat16.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <optional>

#include "parallel.h"

namespace {

using at::Tensor;

constexpr int64_t BLOCK = 512;      // logits that are looked at together
constexpr int64_t GRAIN = 1 << 16;  // logits that a second thread is not woken for
constexpr float NOTHING = -std::numeric_limits<float>::infinity();

// `x` as float32, those that `mask` has no bit for as minus infinity. Returns whether one was NaN before.
template <typename T> bool widen(const T* x, const uint32_t* mask, int64_t num, float* wide) {
    int nan = 0;
    for (int64_t i = 0; i < num; i++) {
        wide[i] = static_cast<float>(x[i]);
        nan |= wide[i] != wide[i];
    }
    if (mask)
        for (int64_t i = 0; i < num; i += 32) {
            const uint32_t word = mask[i / 32];
            for (int64_t j = 0; j < std::min<int64_t>(32, num - i); j++) wide[i + j] = word >> j & 1 ? wide[i + j] : NOTHING;
        }
    return nan;
}

float largest(const float* x, int64_t num) {
    constexpr int64_t LANES = 32;
    float best[LANES];
    for (float& lane : best) lane = NOTHING;
    int64_t i = 0;
    for (; i + LANES <= num; i += LANES)
        for (int64_t j = 0; j < LANES; j++) best[j] = x[i + j] > best[j] ? x[i + j] : best[j];
    for (; i < num; i++) best[0] = std::max(best[0], x[i]);
    return *std::max_element(best, best + LANES);
}

// The first of the largest; -1 where that is not finite, or one is NaN.
template <typename T> int64_t likeliest_of(const T* x, const uint32_t* mask, int64_t num) {
    float wide[BLOCK], best = NOTHING;
    int64_t found = 0;
    for (int64_t at = 0; at < num; at += BLOCK) {
        const int64_t size = std::min(BLOCK, num - at);
        if (widen(x + at, mask ? mask + at / 32 : nullptr, size, wide)) return -1;
        const float most = largest(wide, size);
        if (most > best) {
            best = most;
            found = at;
        }
    }
    if (!std::isfinite(best)) return -1;
    widen(x + found, mask ? mask + found / 32 : nullptr, std::min(BLOCK, num - found), wide);
    return found + (std::find(wide, wide + BLOCK, best) - wide);
}

// int64 [N] of the `rows` of logits [M, V]; of all where none are named. masks int32 [R, W]: for each of them the one at its place.
Tensor likeliest(const Tensor& logits, at::IntArrayRef rows, const std::optional<Tensor>& masks, at::IntArrayRef places) {
    TORCH_CHECK(logits.dim() == 2 && logits.stride(1) == 1 && logits.size(1) > 0, "logits must be [M, V] with rows of one piece");
    const int64_t num = rows.empty() ? logits.size(0) : static_cast<int64_t>(rows.size()), width = logits.size(1);
    for (const int64_t row : rows) TORCH_CHECK(row >= 0 && row < logits.size(0), "row ", row, " is not one of ", logits.size(0));
    if (masks) {
        TORCH_CHECK(masks->scalar_type() == at::kInt && masks->dim() == 2 && masks->is_contiguous() && masks->size(1) * 32 >= width,
                    "masks must be int32 [R, W] with a bit for every logit");
        TORCH_CHECK(static_cast<int64_t>(places.size()) == num, "a place for each row");
        for (const int64_t place : places)
            TORCH_CHECK(place >= 0 && place < masks->size(0), "mask ", place, " is not one of ", masks->size(0));
    }
    Tensor out = at::empty({num}, logits.options().dtype(at::kLong));
    int64_t* ids = out.mutable_data_ptr<int64_t>();
    const auto find = [&](const auto* x) {
        fairlead::parallel_for(0, num, std::max<int64_t>(1, GRAIN / width), [&](int64_t begin, int64_t end) {
            for (int64_t n = begin; n < end; n++) {
                const uint32_t* mask = nullptr;
                if (masks) mask = reinterpret_cast<const uint32_t*>(masks->const_data_ptr<int32_t>()) + places[n] * masks->size(1);
                ids[n] = likeliest_of(x + (rows.empty() ? n : rows[n]) * logits.stride(0), mask, width);
            }
        });
    };
    if (logits.scalar_type() == at::kFloat) {
        find(logits.const_data_ptr<float>());
    } else {
        TORCH_CHECK(logits.scalar_type() == at::kBFloat16, "the likeliest of float32 and bfloat16, not ", logits.scalar_type());
        find(logits.const_data_ptr<c10::BFloat16>());
    }
    return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(fairlead, m) { m.def("likeliest(Tensor logits, int[] rows=[], Tensor? masks=None, int[] places=[]) -> Tensor"); }
TORCH_LIBRARY_IMPL(fairlead, CPU, m) { m.impl("likeliest", &likeliest); }

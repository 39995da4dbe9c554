// The products of csr: instances and launches.
#include "launch.cuh"
#include "mv.cuh"
#include "sddmm.cuh"

namespace sk::csr {
namespace {

#define SK_ENTRY_MM(ROWS, WARPS, STAGES) , MmTile<T, ROWS, WARPS, STAGES>
#define SK_ENTRY_SDDMM(ROWS, WARPS, STAGES) , SddmmTile<T, ROWS, WARPS, STAGES>
#define SK_ENTRY_MV(TOKENS, DISTANCES) , MvTile<T, TOKENS, DISTANCES>
template <Type T>
using MmKernels = Rest<None SK_CSR_MM(SK_ENTRY_MM)>;
template <Type T>
using SddmmKernels = Rest<None SK_CSR_SDDMM(SK_ENTRY_SDDMM)>;
template <Type T>
using MvKernels = Rest<None SK_CSR_MV(SK_ENTRY_MV)>;

template <template <Type> class List>
std::vector<TileInfo> tiles(int type) {
    std::vector<TileInfo> all;
    with_type(type, [&]<Type T>() {
        [&]<class... C>(Kernels<C...>*) {
            (all.push_back({C::kRowsPer, C::kWarps, C::kRows, panel_tokens(T), C::kSharedBytes}), ...);
        }(static_cast<List<T>*>(nullptr));
    });
    return all;
}

}  // namespace

std::vector<TileInfo> mm_tiles(int type) { return tiles<MmKernels>(type); }
std::vector<TileInfo> sddmm_tiles(int type) { return tiles<SddmmKernels>(type); }
int slice_columns() { return kTileK; }
int mv_staged_bytes() { return MvTile<Type::f32, 1, true>::kSharedBytes; }

void panels(const PanelsCall& c) {
    with_type(c.type, [&]<Type T>() {
        using C = PanelTile<T>;
        const Panels p{pointer<const char>(c.x), pointer<char>(c.panels), c.stride, c.m, c.columns};
        const auto blocks = static_cast<unsigned>(up(c.m, C::kTokens) * up(c.columns, C::kColumns));
        device::launch("csr_panels", csr_panels<T>, {blocks, 1, C::kThreads, C::kSharedBytes}, c.stream, p);
    });
}

void mm(const MmCall& c) {
    with_type(c.type, [&]<Type T>() {
        MmKernels<T>::pick(c.kernel, [&]<class C>() {
            Mm p{};
            p.values = pointer<const char>(c.values);
            p.offsets = pointer<const uint16_t>(c.offsets);
            p.starts = pointer<const int32_t>(c.starts);
            p.order = pointer<const int32_t>(c.order);
            p.items = pointer<const Item>(c.items);
            p.panels = pointer<const char>(c.panels);
            p.y = pointer<char>(c.out.y);
            p.y_stride = c.out.y_stride;
            p.nnz = c.nnz;
            p.m = c.m;
            p.n = c.n;
            p.k = c.k;
            p.slices = up(c.k, kTileK);
            p.token_tiles = up(c.m, C::kTokens);
            p.partials = pointer<float>(c.partials);
            p.counters = pointer<uint32_t>(c.counters);
            p.epilogue = epilogue(c.out);
            const auto blocks = static_cast<unsigned>(c.items_count * p.token_tiles);
            device::launch("csr_mm", csr_mm<C>, {blocks, 1, C::kThreads, C::kSharedBytes}, c.stream, p);
        });
    });
}

void mv(const MvCall& c) {
    with_type(c.type, [&]<Type T>() {
        MvKernels<T>::pick(c.kernel, [&]<class C>() {
            if (c.m > C::kTokens) throw std::runtime_error("csr_mv: more tokens than the kernel has");
            Mv p{};
            p.values = pointer<const char>(c.values);
            if (C::kDistances != (c.distances != 0)) throw std::runtime_error("csr_mv: columns of another kind");
            p.distances = pointer<const uint8_t>(c.distances);
            p.short_columns = pointer<const uint16_t>(c.short_columns);
            p.columns = pointer<const int32_t>(c.columns);
            p.units = pointer<const Unit>(c.units);
            p.splits = pointer<const Split>(c.splits);
            p.x = pointer<const char>(c.x);
            p.y = pointer<char>(c.out.y);
            p.x_stride = c.x_stride;
            p.y_stride = c.out.y_stride;
            p.nnz = c.nnz;
            p.m = c.m;
            p.n = c.n;
            p.k = c.k;
            p.units_count = c.units_count;
            p.staged = int64_t{c.k} * C::kTokens * 4 <= C::kSharedBytes;
            p.partials = pointer<float>(c.partials);
            p.counters = pointer<uint32_t>(c.counters);
            p.epilogue = epilogue(c.out);
            device::launch("csr_mv", csr_mv<C>, {static_cast<unsigned>(c.workers), 1, C::kThreads, C::kSharedBytes},
                           c.stream, p);
        });
    });
}

void sddmm(const SddmmCall& c) {
    with_type(c.type, [&]<Type T>() {
        SddmmKernels<T>::pick(c.kernel, [&]<class C>() {
            Sddmm p{};
            p.offsets = pointer<const uint16_t>(c.offsets);
            p.starts = pointer<const int32_t>(c.starts);
            p.order = pointer<const int32_t>(c.order);
            p.x_panels = pointer<const char>(c.x_panels);
            p.dy_panels = pointer<const char>(c.dy_panels);
            p.sums = pointer<float>(c.sums);
            p.out = pointer<char>(c.out);
            p.nnz = c.nnz;
            p.n = c.n;
            p.k = c.k;
            p.slices = up(c.k, kTileK);
            p.token_tiles = up(c.m, panel_tokens(T));
            p.splits = c.splits;
            p.out_type = T;
            const auto blocks = static_cast<unsigned>(c.groups * p.slices * c.splits);
            device::launch("csr_sddmm", csr_sddmm<C>, {blocks, 1, C::kThreads, C::kSharedBytes}, c.stream, p);
        });
    });
}

}  // namespace sk::csr

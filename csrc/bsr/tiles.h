// Loops over AMX tiles. Which matrix is A and which is B follows from what lies well already:
//
//   mm      A = weights (rows of a block, in place)      B = tokens (packed panels)      C: features x tokens
//   mm_t    A = tokens (dY, rows copied side by side)    B = weights (pairs of rows)     C: tokens x features
//   sddmm   A = dY^T (packed)                            B = X (pairs of tokens)         C: a block of dW, in place
//
// mm could also put its tokens into A, but then every weight tile would have to be transposed in every call (64
// shuffles beside the 16 cycles of a product), while turning C once costs the same for the whole block row.
#pragma once
#include <utility>

#include "walk.h"

#if SK_LEVEL >= SK_AMX
SK_ISA_BEGIN

// Up to 4 accumulators (tiles 0..3) of MA x NB; A tiles are 4 and 5, B tiles 6 and 7, so that one configuration
// serves every MA x NB. The operand of the smaller side stays loaded while the larger side passes.
template <int MA, int NB>
struct TileShape {
    static_assert(MA * NB <= 4);
    static constexpr bool kFewA = MA <= NB;
    template <int I>
    static constexpr int kA = 4 + I % 2;
    template <int I>
    static constexpr int kB = 6 + I % 2;
    template <int I, int J>
    static constexpr int kC = I * NB + J;
};

template <int N, class F>
inline void unrolled(F&& f) {
    [&]<int... I>(std::integer_sequence<int, I...>) {
        (f.template operator()<I>(), ...);
    }(std::make_integer_sequence<int, N>{});
}

struct DotBf16 {
    template <int C, int A, int B>
    static void dp() {
        tile_dp_bf16<C, A, B>();
    }
};
struct DotI8 {
    template <int C, int A, int B>
    static void dp() {
        tile_dp_i8<C, A, B>();
    }
};

// C += A * B for one depth step. a + I * a_next: A tile I, rows a_row bytes apart; b likewise. Values only, no lambdas:
// the tile instructions clobber memory, and what a lambda captures would be reloaded after each of them.
template <class Dot, int MA, int NB, int J = 0>
[[gnu::always_inline]] inline void tile_column(const char* b, int64_t b_next, int64_t b_row) {
    using S = TileShape<MA, NB>;
    tile_load<S::template kB<J>>(b, b_row);
    Dot::template dp<S::template kC<0, J>, S::template kA<0>, S::template kB<J>>();
    if constexpr (MA > 1) Dot::template dp<S::template kC<1, J>, S::template kA<1>, S::template kB<J>>();
    if constexpr (J + 1 < NB) tile_column<Dot, MA, NB, J + 1>(b + b_next, b_next, b_row);
}
template <class Dot, int MA, int I = 0>
[[gnu::always_inline]] inline void tile_row(const char* a, int64_t a_next, int64_t a_row) {
    using S = TileShape<MA, 1>;
    tile_load<S::template kA<I>>(a, a_row);
    Dot::template dp<S::template kC<I, 0>, S::template kA<I>, S::template kB<0>>();
    if constexpr (I + 1 < MA) tile_row<Dot, MA, I + 1>(a + a_next, a_next, a_row);
}
template <class Dot, int MA, int NB>
[[gnu::always_inline]] inline void tile_step(const char* a, int64_t a_next, int64_t a_row, const char* b,
                                             int64_t b_next, int64_t b_row) {
    using S = TileShape<MA, NB>;
    if constexpr (S::kFewA) {
        static_assert(MA <= 2);
        tile_load<S::template kA<0>>(a, a_row);
        if constexpr (MA > 1) tile_load<S::template kA<1>>(a + a_next, a_row);
        tile_column<Dot, MA, NB>(b, b_next, b_row);
    } else {
        static_assert(NB == 1);
        tile_load<S::template kB<0>>(b, b_row);
        tile_row<Dot, MA>(a, a_next, a_row);
    }
}

template <int MA, int NB>
inline void tiles_zero() {
    unrolled<MA * NB>([]<int I> { tile_zero<I>(); });
}

template <int MA, int NB>
inline void tiles_load(const float* c, int64_t c_down, int64_t c_right, int64_t c_row) {
    unrolled<MA>([&]<int I> {
        unrolled<NB>([&]<int J> {
            tile_load<TileShape<MA, NB>::template kC<I, J>>(reinterpret_cast<const char*>(c) + I * c_down + J * c_right,
                                                            c_row);
        });
    });
}

// C tile (I, J) to c + I * c_down + J * c_right bytes, rows c_row bytes apart.
template <int MA, int NB>
inline void tiles_store(float* c, int64_t c_down, int64_t c_right, int64_t c_row) {
    unrolled<MA>([&]<int I> {
        unrolled<NB>([&]<int J> {
            tile_store<TileShape<MA, NB>::template kC<I, J>>(reinterpret_cast<char*>(c) + I * c_down + J * c_right,
                                                             c_row);
        });
    });
}

// Calls f.template operator()<MA, NB>() for ma x nb tiles, 1 <= ma * nb <= 4.
template <class F>
inline void dispatch_tiles(int ma, int nb, F&& f) {
    switch (ma * 8 + nb) {
        case 8 + 1: return f.template operator()<1, 1>();
        case 8 + 2: return f.template operator()<1, 2>();
        case 8 + 3: return f.template operator()<1, 3>();
        case 8 + 4: return f.template operator()<1, 4>();
        case 16 + 1: return f.template operator()<2, 1>();
        case 16 + 2: return f.template operator()<2, 2>();
        case 24 + 1: return f.template operator()<3, 1>();
        case 32 + 1: return f.template operator()<4, 1>();
    }
}

// The largest divisor of n that is at most 16: how rows (or dwords of depth) of a block fill tiles.
inline int tile_part(int64_t n) {
    int64_t part = n < 16 ? n : 16;
    while (n % part) --part;
    return int(part);
}

// A tiles a_rows x depth dwords, B tiles depth x b_cols, C tiles a_rows x b_cols.
inline TileConfig tile_config(int a_rows, int depth, int b_cols) {
    TileConfig config;
    for (int i = 0; i < 4; ++i) config.tile(i, a_rows, b_cols * 4);
    for (int i = 4; i < 6; ++i) config.tile(i, a_rows, depth * 4);
    for (int i = 6; i < 8; ++i) config.tile(i, depth, b_cols * 4);
    return config;
}

SK_ISA_END
#endif

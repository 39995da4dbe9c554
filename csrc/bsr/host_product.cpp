// mm and mm_t: which driver runs a call.
#include "product.h"

SK_ISA_BEGIN
namespace {

void run(Product& p) {
    if (p.tokens() == 0 || p.total_outs() == 0) return;
    choose_mode(p);
    if (p.blocks() * p.w.block_rows * p.w.block_cols * p.tokens() < kSerialWork) p.threads = 1;
#if SK_LEVEL >= SK_AMX
    if (tiles_suit(p)) return product_tiles(p);
#endif
    if (dot_suits(p)) return product_dot(p);
    product_vector(p);
}

}  // namespace

void bsr_mm(const BsrMm& a) {
    Product p{a.w, false, a.crow, a.col, nullptr, a.x, a.y, a.epilogue, a.threads};
    p.epilogue.scale = a.w.scale;
    run(p);
}

void bsr_mm_t(const BsrMmT& a) {
    Product p{a.w,      true, a.crow_t, a.row_t, a.gather_t, a.dy, a.dx, {nullptr, nullptr, Dtype::f32, Act::none},
              a.threads};
    run(p);
}

SK_ISA_END

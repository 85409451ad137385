#include "emulator.hpp"
#include "product.cu"

static void enter() {
    product(*parameters);
    self->done = true;
    swapcontext(&self->context, &scheduler);
}

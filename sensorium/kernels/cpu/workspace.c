/* The memory behind workspace.h. One allocation is kept, the last one used; concurrent callers get their own. There is
 * no lock, since a forked child could find it locked forever. */
#include "workspace.h"

#include <stdatomic.h>
#include <stddef.h>
#include <sys/mman.h>

#include "simd.h"

#define HUGE_PAGE (1L << 21)
#define HEADER_BYTES 4096 /* before the memory, for its size */

static _Atomic(char *) spare;

static long size_of_piece(const char *piece) { return *(const long *)piece; }

static void release(char *piece) {
    if (piece) munmap(piece, (size_t)size_of_piece(piece));
}

/* A separate mapping begins at a page, and may be backed by huge pages, which need fewer TLB entries. */
static char *map_piece(long bytes) {
    char *piece = mmap(NULL, (size_t)bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (piece == MAP_FAILED) return NULL;
#if defined(MADV_HUGEPAGE)
    madvise(piece, (size_t)bytes, MADV_HUGEPAGE);
#endif
    *(long *)piece = bytes;
    return piece;
}

char *sensorium_open_workspace(long bytes) {
    const long wanted = round_up(bytes + HEADER_BYTES, HUGE_PAGE);
    char *piece = atomic_exchange(&spare, NULL);
    if (!piece || size_of_piece(piece) < wanted) {
        release(piece);
        piece = map_piece(wanted);
    }
    return piece ? piece + HEADER_BYTES : NULL;
}

void sensorium_close_workspace(char *memory) { release(atomic_exchange(&spare, memory - HEADER_BYTES)); }

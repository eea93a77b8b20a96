/* Whether this process may use tiles. */
#include "tiles.h"

#if TILES == HARDWARE_TILES
#include <sys/syscall.h>
#include <unistd.h>

#define REQUEST_STATE_PERMISSION 0x1023 /* ARCH_REQ_XCOMP_PERM */
#define TILE_DATA 18                    /* XFEATURE_XTILEDATA */

/* The tiles' content is large, so the system saves it only for processes that have requested it. A system that doesn't
 * know the request, or forbids it, returns an error. The permission includes existing threads. */
static int permitted(void) { return syscall(SYS_arch_prctl, REQUEST_STATE_PERMISSION, TILE_DATA) == 0; }
#else
static int permitted(void) { return TILES == EMULATED_TILES; }
#endif

int sensorium_tiles_on;

/* Use tiles if wanted and possible; returns whether they are in use. Called before any other function. */
EXPORT int sensorium_use_tiles(int wanted) {
    sensorium_tiles_on = wanted && permitted();
    return sensorium_tiles_on;
}

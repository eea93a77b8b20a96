/* Working memory that is kept from call to call, so that the system doesn't have to clear new pages for each. */
#ifndef SENSORIUM_WORKSPACE_H
#define SENSORIUM_WORKSPACE_H

/* Take at least so many bytes with any content, beginning at a page; null if there is no memory. */
char *sensorium_open_workspace(long bytes);

/* Give them back. */
void sensorium_close_workspace(char *memory);

#endif
